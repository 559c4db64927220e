"""Locks, waits and backends as models: what is found, by what, and what breaks nothing."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import call_command
from django.db import DataError, OperationalError, connection, connections, models, transaction
from django.test.utils import isolate_apps, override_settings

from celery_pglock import ACCESS_EXCLUSIVE, LockMisuse, advisory, advisory_id, labels
from celery_pglock.keys import key
from celery_pglock.labels import Holding, Owner
from celery_pglock.looks import looking
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock, SkipCount
from tests.bystanders import bystanders, waits
from tests.conftest import wait_until
from tests.models import Entry
from tests.servers import Cluster

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "locks", "sqlite"])

TABLE = Entry._meta.db_table
NASTY = [
    "it's",
    "50% %s %(x)s",
    "a/*b*/c",
    "a*b",
    "nul\x00nul",
    "é🔒",
    'say "x"',
    "tab\tnew\nline",
    "a b:c=d",
    "-.~_",
]


@pytest.fixture
def session():
    with bystanders() as make:
        yield make


def execute(sql, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters or None)


def one(**filters):
    return PGLock.objects.get(**filters)


class TestKinds:
    @pytest.mark.parametrize(
        ("call", "numbers", "mode"),
        [
            ("pg_advisory_lock(7)", (0, 7, 1), "EXCLUSIVE"),
            ("pg_advisory_lock(-1)", (2**32 - 1, 2**32 - 1, 1), "EXCLUSIVE"),
            ("pg_advisory_lock(1, -2)", (1, 2**32 - 2, 2), "EXCLUSIVE"),
            ("pg_advisory_lock_shared(7)", (0, 7, 1), "SHARE"),
            ("pg_advisory_xact_lock(7)", (0, 7, 1), "EXCLUSIVE"),
            ("pg_advisory_xact_lock_shared(1, 2)", (1, 2, 2), "SHARE"),
        ],
    )
    def test_an_advisory_lock_has_the_numbers_of_pg_locks(self, session, call, numbers, mode):
        holder = session()
        holder.does("BEGIN", f"SELECT {call}")
        found = one(type="ADVISORY")
        assert (found.classid, found.objid, found.objsubid, found.mode) == (*numbers, mode)
        assert (found.activity_id, found.granted, found.name) == (holder.pid, True, "")
        assert (found.wait_start, found.wait_duration, found.relation, found.rel_name) == (None,) * 4

    def test_a_text_lock_is_found_by_its_name_and_its_numbers(self):
        with advisory("invoice:7"):
            found = one(name="invoice:7")
            assert (found.classid, found.objid) == advisory_id("invoice:7")

    def test_a_waiter_is_told_with_its_time(self, session):
        holder, waiter = session(), session()
        holder.does("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        wait = BlockedPGLock.objects.select_related("activity", "blocking_activity").get()
        assert (wait.activity.pk, wait.blocking_activity.pk, wait.granted) == (waiter.pid, holder.pid, False)
        wait_until(lambda: BlockedPGLock.objects.get().wait_start is not None)
        wait = BlockedPGLock.objects.get()
        assert timedelta(0) < wait.wait_duration < timedelta(seconds=20)

    @pytest.mark.parametrize(
        ("mode", "spelling"),
        [
            ("ACCESS SHARE", "ACCESS_SHARE"),
            ("ROW EXCLUSIVE", "ROW_EXCLUSIVE"),
            ("SHARE UPDATE EXCLUSIVE", "SHARE_UPDATE_EXCLUSIVE"),
            ("SHARE ROW EXCLUSIVE", "SHARE_ROW_EXCLUSIVE"),
            ("ACCESS EXCLUSIVE", "ACCESS_EXCLUSIVE"),
        ],
    )
    def test_a_table_lock_has_its_table(self, session, mode, spelling):
        holder = session()
        holder.does("BEGIN", f"LOCK TABLE {TABLE} IN {mode} MODE")
        found = PGLock.objects.on(Entry).get()
        assert (found.type, found.mode, found.rel_kind, found.rel_name) == (
            "RELATION",
            spelling,
            "TABLE",
            TABLE,
        )
        assert found.relation == int(holder.ask("SELECT %s::regclass::oid", TABLE))

    @pytest.mark.parametrize("wants", [f"UPDATE {TABLE} SET key = 'z'", f"SELECT FROM {TABLE} FOR UPDATE"])
    def test_who_waits_for_a_row_waits_for_its_transaction_and_names_the_table(self, session, wants):
        Entry.objects.create(key="a", task_id="", what="")
        holder, first, second = session(), session(), session()
        holder.does("BEGIN", f"UPDATE {TABLE} SET key = 'b'")
        first.waits(wants)
        second.waits(wants)
        found = {wait.type: wait for wait in BlockedPGLock.objects.on(Entry)}
        assert found["TRANSACTIONID"].blocking_activity_id == holder.pid
        assert found["TRANSACTIONID"].rel_name == found["TUPLE"].rel_name == TABLE
        assert waits() == {(first.pid, holder.pid), (second.pid, first.pid)}

    def test_a_wait_behind_two_holders_is_two_rows(self, session):
        holders, waiter = [session(), session()], session()
        for holder in holders:
            holder.does("SELECT pg_advisory_lock_shared(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        assert waits() == {(waiter.pid, holder.pid) for holder in holders}
        assert BlockedPGLock.objects.count() == 2
        assert len({wait.id for wait in BlockedPGLock.objects.all()}) == 2

    def test_a_waiter_behind_a_waiter_is_blocked_by_it(self, session):
        holder, first, second = session(), session(), session()
        holder.does("SELECT pg_advisory_lock_shared(7)")
        first.waits("SELECT pg_advisory_lock(7)")
        second.waits("SELECT pg_advisory_lock_shared(7)")
        assert waits() == {(first.pid, holder.pid), (second.pid, first.pid)}
        assert not BlockedPGLock.objects.filter(granted=True).exists()

    def test_an_id_names_a_lock_and_not_its_position(self, session):
        holder, other = session(), session()
        holder.does("SELECT pg_advisory_lock(7), pg_advisory_lock_shared(7), pg_advisory_lock(1, 7)")
        before = {lock.id: str(lock) for lock in PGLock.objects.filter(type="ADVISORY")}
        assert len(before) == 3
        other.does("SELECT pg_advisory_lock(6)")
        holder.does("SELECT 1")
        assert (
            before.items() < {lock.id: str(lock) for lock in PGLock.objects.filter(type="ADVISORY")}.items()
        )
        for name, text in before.items():
            assert str(PGLock.objects.get(pk=name)) == text

    def test_ids_are_unique_where_transactions_left_what_they_read(self, session):
        overlapping, reader = session(), session()
        overlapping.does("BEGIN ISOLATION LEVEL SERIALIZABLE", f"SELECT FROM {TABLE}")
        for _ in range(2):
            reader.does("BEGIN ISOLATION LEVEL SERIALIZABLE", f"SELECT FROM {TABLE}", "SELECT txid_current()")
            reader.does("COMMIT")
        reads = list(PGLock.objects.filter(mode="SIREAD", activity_id=reader.pid).on(Entry))
        assert len(reads) == len({read.id for read in reads}) == 2

    def test_a_table_that_is_being_made_has_its_oid_but_no_name_yet(self, session):
        maker = session()
        maker.does("BEGIN", "CREATE TABLE unborn ()")
        oid = int(maker.ask("SELECT 'unborn'::regclass::oid"))
        assert one(relation=oid, mode="ACCESS_EXCLUSIVE").rel_name is None

    def test_a_prepared_transaction_in_the_way_has_no_backend(self, monkeypatch):
        locks = connections["locks"]
        with Cluster(max_prepared_transactions="2") as cluster:
            locks.close()
            here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
            for name, value in here.items():
                monkeypatch.setitem(locks.settings_dict, name, value)
            try:
                call_command("migrate", "celery_pglock", database="locks", verbosity=0)
                self._check_prepared()
            finally:
                locks.close()

    def _check_prepared(self):
        with bystanders("locks") as make:
            holder, waiter = make(), make()
            holder.does("BEGIN", "LOCK TABLE celery_pglock_skipcount", "PREPARE TRANSACTION 'x'")
            waiter.waits("SELECT FROM celery_pglock_skipcount")
            wait = BlockedPGLock.objects.using("locks").select_related("blocking_activity").get()
            assert (wait.blocking_activity, wait.activity_id) == (None, waiter.pid)
            held = PGLock.objects.using("locks").on(SkipCount).get(granted=True)
            assert (held.activity_id, held.mode) == (None, "ACCESS_EXCLUSIVE")
            found = BlockedPGLock.objects.using("locks")
            assert found.cancel_blocking_activity() == found.terminate_blocking_activity() == ()
            holder.does("ROLLBACK PREPARED 'x'")


class TestNames:
    @pytest.mark.parametrize("name", NASTY)
    def test_any_name_is_told_and_found(self, name):
        with advisory(name), advisory("something else"):
            lock = one(name=name)
            assert lock.name == name
            half = len(name) // 2
            for lookup, part in [
                ("in", [name, "x"]),
                ("contains", name[1:]),
                ("icontains", name[1:].upper()),
                ("startswith", name[:half]),
                ("istartswith", name[:half].swapcase()),
                ("endswith", name[half:]),
                ("iendswith", name[half:].upper()),
                ("iexact", name.swapcase()),
            ]:
                assert one(**{f"name__{lookup}": part}).id == lock.id, lookup

    @pytest.mark.parametrize(
        "filters", [{"contains": "20"}, {"icontains": "3a"}, {"endswith": "A7"}, {"contains": "a.b"}]
    )
    def test_a_part_is_not_found_in_the_encoding(self, filters):
        with advisory("a b"), advisory("invoice:7"):
            assert not PGLock.objects.filter(**{f"name__{lookup}": part for lookup, part in filters.items()})

    def test_a_long_name_is_found_by_what_is_kept_of_it(self):
        name = "ü" * 5000
        with advisory(name):
            assert one(name=name).name == "ü" * 100
            assert one(name__startswith=name[:7]).id == one(name__contains=name).id

    def test_the_task_that_holds_a_lock_is_told_and_found(self, session):
        owner = Owner("shop.tasks.bill 50%", "a:b*c", "worker@é")
        lock = key("x y")
        comment = labels.comment(owner, [Holding(lock, 1.0)], show_names=True)
        session().does(f"{comment} SELECT pg_advisory_lock({lock.arguments[0]})")
        found = one(task_name="shop.tasks.bill 50%", task_id="a:b*c", worker__startswith="worker@")
        assert (found.name, found.task_name, found.task_id, found.worker) == (
            "x y", "shop.tasks.bill 50%", "a:b*c", "worker@é"
        )  # fmt: skip

    def test_whoever_had_to_wait_has_it_since_the_wait_is_over(self, rival):
        rival.take("mine")

        def free_it():
            wait_until(lambda: rival.sees_held("mine", granted=False))
            time.sleep(0.5)
            rival.give_back("mine")

        with ThreadPoolExecutor() as others:
            freed = others.submit(free_it)
            began = time.time()
            with advisory("mine") as acquired:
                freed.result()
                assert acquired
                for since in (one(name="mine").since, advisory("mine").holders()[0].since):
                    assert since.timestamp() - began > 0.4

    def test_a_key_that_was_asked_for_is_had_since_the_statement_has_ended(self, session):
        lock = key("x")
        comment = labels.comment(Owner("task", "id", "w"), [Holding(lock, None)], show_names=True)
        holder = session()
        holder.does("BEGIN", f"{comment} SELECT pg_advisory_xact_lock({lock.arguments[0]})")
        found = PGLock.objects.select_related("activity").get(name="x")
        assert found.since == found.activity.state_change
        holder.sends(f"{comment} SELECT pg_sleep(60)")
        wait_until(lambda: PGActivity.objects.get(pk=holder.pid).state == "ACTIVE")
        assert one(name="x").since is None

    def test_whoever_has_the_second_place_of_a_limit_is_told_too(self, rival):
        rival.take("export")
        with advisory("export", limit=2):
            assert one(name="export (slot 1)").since is not None

    @pytest.mark.parametrize("task_id", ["invoice:7", "100%", "a b*c"])
    def test_a_task_id_in_an_application_name_is_found(self, session, task_id):
        holder = session(application_name=f"celery:{task_id}")
        holder.does("BEGIN", f"LOCK TABLE {TABLE}")
        assert PGLock.objects.on(Entry).get(task_id=task_id).task_id == task_id
        assert PGLock.objects.on(Entry).get(task_id__endswith=task_id[2:]).activity_id == holder.pid

    def test_a_label_that_names_another_lock_is_not_believed(self, session):
        comment = labels.comment(Owner("task", "id", "w"), [Holding(key("mine"), 1.0)], show_names=True)
        session().does(f"{comment} SELECT pg_advisory_lock(7)")
        found = one(type="ADVISORY")
        assert (found.name, found.task_name, found.task_id, found.worker) == ("",) * 4

    @pytest.mark.parametrize(
        "comment",
        [
            "/*pglock:1 task=%FF%00%ZZ id=%ED%A0%80 worker=( key=1:0:8:1:%FF*/",
            "/*pglock:1 task=t id=i worker=w key=1:0:7:1:cut",
            "/*pglock:1 task=t id=i worker=w key=1:0:7:1e9:x*/",
            "/*pglock:1 " + "key=1:0:9:1:x " * 3000 + "*/",
            "/*pglock:1 task=[a-z](((( id=.* worker=\\ key=.:.:.:.:.*/",
            "/*pglock:1 */", "/*pglock:1 key=*/", "/*pga_context={*/", "/*pga_context=5*/",
            "/*pga_context=" + "[" * 990 + "*/", "/*pga_context=" + "9" * 5000 + "*/",
        ],
    )  # fmt: skip
    def test_a_hostile_label_is_neither_believed_nor_harmful(self, session, comment):
        holder = session()
        cut = comment if comment.endswith("*/") else f"{comment}{'t' * 2000}*/"
        holder.does(f"{cut} SELECT pg_advisory_lock(7)")
        found = PGLock.objects.select_related("activity").get(activity_id=holder.pid, type="ADVISORY")
        assert (found.name, found.task_name, found.task_id, found.worker) == ("",) * 4
        assert found.activity.context is None or set(found.activity.context) == {
            "task_name", "task_id", "worker", "keys"
        }  # fmt: skip

    @pytest.mark.parametrize("since", ["1e999", "nan", "-1", "9" * 30])
    def test_a_forged_time_does_not_break_who_asks_for_the_holders(self, session, since):
        lock = key("forged")
        forged = f"/*pglock:1 key=1:{lock.classid}:{lock.objid}:{since}:x*/"
        session().does(f"{forged} SELECT pg_advisory_lock({lock.arguments[0]})")
        assert len(advisory("forged").holders()) == 1
        assert one(type="ADVISORY").since is None

    def test_a_lock_tells_since_when(self, session):
        before = time.time()
        with advisory("mine"):
            assert before - 1 < one(name="mine").since.timestamp() <= time.time()
            waiter = session()
            waiter.waits(f"SELECT pg_advisory_lock({key('mine').arguments[0]})")
            wait_until(lambda: one(activity_id=waiter.pid, granted=False).since is not None)
            found = BlockedPGLock.objects.get(activity_id=waiter.pid)
            assert found.since == found.wait_start
        holder = session()
        holder.does("BEGIN", f"LOCK TABLE {TABLE}", "SELECT pg_advisory_lock(7)")
        found = PGLock.objects.on(Entry).select_related("activity").get()
        assert found.since == found.activity.xact_start
        assert one(objid=7).since is None

    def test_without_show_names_the_task_is_told_and_the_name_is_not(self, pglock_settings):
        pglock_settings(SHOW_NAMES=False)
        with advisory("secret"):
            found = one(type="ADVISORY")
            assert (found.name, found.objid) == ("", key("secret").objid)
            assert not PGActivity.objects.filter(query__contains="secret").exclude(query__contains="FROM")

    def test_the_context_is_told_apart_from_the_query(self):
        with advisory("x"):
            activity = one(name="x").activity
            assert activity.context == {"task_name": "", "task_id": "", "worker": "", "keys": ["x"]}
            assert not activity.query.startswith("/*")

    def test_the_context_cannot_be_filtered(self):
        with pytest.raises(LockMisuse, match="task_name"):
            PGActivity.objects.filter(context="x").count()

    @pytest.mark.parametrize("lookup", ["name", "name__contains", "task_id__in"])
    def test_a_lone_surrogate_is_refused(self, lookup):
        with pytest.raises(LockMisuse, match="lone surrogate"):
            PGLock.objects.filter(**{lookup: ["\ud800"] if lookup.endswith("in") else "\ud800"}).count()

    def test_a_nul_where_postgresql_has_text_is_an_error_and_not_the_end(self):
        with pytest.raises((DataError, ValueError), match="NUL"):
            PGLock.objects.filter(rel_name="a\x00").count()
        assert PGActivity.objects.exists()


class TestFilters:
    @pytest.mark.parametrize(
        "span", ["1 minute 30 s", "90s", 90, 90.0, timedelta(seconds=90), "00:01:30", "PT1M30S"]
    )
    def test_a_length_of_time_is_written_in_many_ways(self, session, span):
        holder, waiter = session(), session()
        holder.does("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        wait_until(lambda: BlockedPGLock.objects.filter(wait_duration__gt="1 ms"))
        assert BlockedPGLock.objects.filter(wait_duration__lt=span).count() == 1
        assert not BlockedPGLock.objects.filter(wait_duration__gte=span).exists()
        assert BlockedPGLock.objects.filter(wait_duration__range=[0, span]).count() == 1

    @pytest.mark.parametrize(
        "text", ["soon", "", "5 parsecs", "5 months", True, "9" * 400 + " days", "nan s"]
    )
    def test_what_is_no_length_of_time_is_named(self, text):
        with pytest.raises(LockMisuse, match="wait_duration must be an interval"):
            PGLock.objects.filter(wait_duration__gt=text).count()

    def test_locks_are_chosen_by_their_tables(self, session):
        session().does("BEGIN", f"LOCK TABLE {TABLE}", "LOCK TABLE celery_pglock_skipcount")
        names = PGLock.objects.filter(type="RELATION").values_list("rel_name", flat=True)
        assert set(names.on("tests.Entry")) == set(names.on(Entry(key="x"))) == {TABLE}
        assert set(names.on(Entry, "celery_pglock.SkipCount")) == {TABLE, "celery_pglock_skipcount"}
        assert not names.on("tests.Entry").on(SkipCount)

    @pytest.mark.parametrize(
        "spelt",
        [
            {"mode": "AccessExclusiveLock"},
            {"mode": ACCESS_EXCLUSIVE},
            {"mode": "access_exclusive"},
            {"type": "relation"},
            {"type__in": ["tuple", "Relation"]},
            {"rel_kind": "table"},
            {"activity__state": "idle in transaction"},
            {"activity__wait_event": "ClientRead"},
            {"activity__backend_type": "client backend"},
        ],
    )
    def test_words_are_found_as_postgresql_spells_them(self, session, spelt):
        session().does("BEGIN", f"LOCK TABLE {TABLE}")
        assert PGLock.objects.on(Entry).filter(**spelt).count() == 1

    @isolate_apps("tests")
    @pytest.mark.parametrize("table", ['other"."tests_entry', 'other"."o\'d %s d', 'oDd %(x)s"."a.b'])
    def test_a_table_is_meant_in_its_own_schema(self, session, table):
        schema, _, name = table.partition('"."')

        class Odd(models.Model):
            class Meta:
                app_label = "tests"
                db_table = f'"{table}"'

        assert name
        execute(f'CREATE SCHEMA "{schema}"')
        try:
            holder = session()
            holder.does(f'CREATE TABLE "{table}" ()', "BEGIN", f'LOCK TABLE "{table}"')
            assert PGLock.objects.on(Odd).get().rel_name == f"{schema}.{name}"
            assert not PGLock.objects.on(Entry).exists()
            holder.does("ROLLBACK", "BEGIN", f"LOCK TABLE {TABLE}")
            assert not PGLock.objects.on(Odd).exists()
            holder.does("ROLLBACK")
        finally:
            execute(f'DROP SCHEMA "{schema}" CASCADE')

    def test_a_table_that_is_missing_has_no_locks(self):
        execute(f"ALTER TABLE {TABLE} RENAME TO elsewhere")
        try:
            assert not PGLock.objects.on(Entry).exists()
        finally:
            execute(f"ALTER TABLE elsewhere RENAME TO {TABLE}")

    @pytest.mark.parametrize(
        ("given", "reason"),
        [("tests.Entri", "Did you mean 'tests.Entry'"), (7, "is no model"), ("x", "no model 'x'")],
    )
    def test_what_is_no_model_is_refused(self, given, reason):
        with pytest.raises(LockMisuse, match=reason):
            PGLock.objects.on(given)

    def test_nothing_chosen_is_refused(self):
        with pytest.raises(LockMisuse, match="at least one pid"):
            PGActivity.objects.pid()
        with pytest.raises(LockMisuse, match="at least one model"):
            PGLock.objects.on()

    def test_locks_and_backends_are_chosen_by_pid(self, session):
        first, second = session(), session()
        for number, holder in enumerate((first, second)):
            holder.does(f"SELECT pg_advisory_lock({number})")
        assert set(PGActivity.objects.pid(first.pid, str(second.pid)).values_list("id", flat=True)) == {
            first.pid, second.pid
        }  # fmt: skip
        assert PGLock.objects.filter(type="ADVISORY").pid(first.pid).get().objid == 0

    @pytest.mark.parametrize("pid", ["x", "1; SELECT 1", -1, 2**31, "9" * 5000, True, None, 1.5, "٣"])
    def test_what_is_no_pid_is_refused(self, pid):
        with pytest.raises(LockMisuse, match="is not a pid"):
            PGLock.objects.pid(pid)

    def test_it_chains_as_any_queryset(self, session):
        holder = session()
        holder.does("BEGIN", f"LOCK TABLE {TABLE}", "SELECT pg_advisory_lock(7), pg_advisory_lock(8)")
        found = PGLock.objects.filter(granted=True).pid(holder.pid).select_related("activity")
        assert found.on(Entry).values_list("rel_name", flat=True)[0] == TABLE
        assert found.filter(type="ADVISORY").order_by("-objid").values("objid")[:1].get() == {"objid": 8}
        assert found.filter(objid__in=[7, 8]).count() == len(found.exclude(objid=None)) == 2
        assert found.filter(activity__state="IDLE_IN_TRANSACTION").exists()
        assert {lock.activity.state for lock in found} == {"IDLE_IN_TRANSACTION"}


class TestConfigurations:
    def test_a_configuration_chooses(self, session, pglock_settings):
        holder, waiter = session(), session()
        holder.does("BEGIN", f"LOCK TABLE {TABLE}", "SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        configs = {
            "tables": {"on": ["tests.Entry"], "filters": ["granted=true"], "database": "locks"},
            "waiters": {"filters": ["granted=no", "type__in=ADVISORY,TUPLE"], "pids": [waiter.pid]},
        }
        before = repr(configs)
        pglock_settings(CONFIGS=configs)
        tables = PGLock.objects.config("tables")
        assert (tables.db, tables.get().activity_id) == ("locks", holder.pid)
        assert PGLock.objects.config("waiters").get().activity_id == waiter.pid
        assert not PGLock.objects.config("waiters", pids=[holder.pid], on=[]).exists()
        assert PGActivity.objects.config(None, pids=[waiter.pid]).get().pk == waiter.pid
        assert repr(configs) == before

    def test_the_settings_of_django_pglock_stand_in(self, pglock_settings):
        with override_settings(PGLOCK_CONFIGS={"mine": {"filters": ["name=x"]}}, PGLOCK_LIMIT=3):
            with advisory("x"), advisory("y"):
                assert PGLock.objects.config("mine").get().name == "x"
            pglock_settings(CONFIGS={})
            with pytest.raises(LockMisuse, match="no configuration 'mine'"):
                PGLock.objects.config("mine")

    @pytest.mark.parametrize(
        ("name", "config", "reason"),
        [
            ("waitr", {}, "Did you mean 'waiter'"),
            (5, {}, "no configuration 5"),
            ("waiter", {"filter": []}, "Did you mean 'filters'"),
            ("waiter", {"filters": "granted=true"}, "must be a list"),
            ("waiter", {"pids": 5}, "must be a list"),
            ("waiter", {"pids": ["x"]}, "is not a pid"),
            ("waiter", ["x"], "must be a dict"),
            ("waiter", {"database": "lock"}, "Did you mean 'locks'"),
            ("waiter", {"on": ["tests.Entri"]}, "Did you mean 'tests.Entry'"),
            ("waiter", {"cancel": True, "terminate": True}, "not both"),
            ("waiter", {"filters": ["grantd=true"]}, "Did you mean 'granted'"),
            ("waiter", {"filters": ["granted"]}, "LOOKUP=VALUE"),
            ("waiter", {"filters": ["granted=maybe"]}, "'maybe' is not true or false"),
            ("waiter", {"filters": ["wait_duration__gte=soon"]}, "wait_duration must be"),
            ("waiter", {"filters": ["_connector=OR 1=1 OR"]}, "LOOKUP=VALUE"),
            ("waiter", {"filters": ["objid=x"]}, "cannot be used"),
            ("waiter", {"filters": ["granted__nope=1"]}, "cannot be used"),
        ],
    )
    def test_what_is_wrong_in_one_is_named(self, pglock_settings, name, config, reason):
        pglock_settings(CONFIGS={"waiter": config})
        with pytest.raises(LockMisuse, match=reason):
            PGLock.objects.config(name)

    def test_backends_are_on_no_models(self):
        with pytest.raises(LockMisuse, match="leave `on` out"):
            PGActivity.objects.config(None, on=["tests.Entry"])


class TestLooking:
    def test_a_locked_table_holds_up_no_look(self, session):
        session().does("BEGIN", f"LOCK TABLE {TABLE}")
        with looking("default"):
            assert PGLock.objects.on(Entry).exists()
            assert not list(BlockedPGLock.objects.all())

    @pytest.mark.parametrize("nested", [True, False])
    def test_a_locked_view_ends_the_look_and_the_settings_stay(self, session, nested):
        # LOCK TABLE would lock all that the view reads, too: the catalogue of the whole cluster.
        session().does("BEGIN", "ALTER VIEW celery_pglock_pglock SET (security_barrier = false)")
        execute("SET lock_timeout = '7s'; SET statement_timeout = '9s'")
        try:
            with transaction.atomic() if nested else nullcontext():
                with pytest.raises(OperationalError, match="lock timeout"), looking("default"):
                    PGLock.objects.count()
                with looking("default"):
                    PGActivity.objects.count()
                with connection.cursor() as cursor:
                    cursor.execute(
                        "SELECT current_setting('lock_timeout'), current_setting('statement_timeout')"
                    )
                    assert cursor.fetchone() == ("7s", "9s")
        finally:
            execute("RESET lock_timeout; RESET statement_timeout")

    def test_without_autocommit_the_settings_stay_too(self):
        transaction.set_autocommit(False)
        try:
            with looking("default"):
                PGActivity.objects.count()
            with connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
                assert cursor.fetchone() == ("0", "0")
        finally:
            transaction.rollback()
            transaction.set_autocommit(True)

    def test_within_a_transaction_it_is_looked_anew(self, session):
        somebody = session(application_name="before")
        with transaction.atomic():
            assert PGActivity.objects.get(id=somebody.pid).application_name == "before"
            somebody.does("SET application_name = 'after'")
            with looking("default"):
                assert PGActivity.objects.get(id=somebody.pid).application_name == "after"

    def test_a_missing_migration_is_named(self):
        call_command("migrate", "celery_pglock", "0002", verbosity=0)
        try:
            with pytest.raises(LockMisuse, match="migrate celery_pglock --database=locks"), looking("locks"):
                PGLock.objects.using("locks").count()
        finally:
            call_command("migrate", "celery_pglock", verbosity=0)
        assert PGActivity.objects.exists()

    def test_another_database_is_refused(self):
        with pytest.raises(LockMisuse, match="'sqlite' is not PostgreSQL"), looking("sqlite"):
            pass


class TestDjango:
    def test_nothing_is_dumped(self):
        with advisory("x"):
            out = StringIO()
            call_command("dumpdata", "celery_pglock", stdout=out)
            assert json.loads(out.getvalue()) == []

    def test_no_migration_is_missing(self):
        call_command("makemigrations", "celery_pglock", check=True, dry_run=True, verbosity=0)
