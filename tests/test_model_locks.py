"""model(): locks on tables, and what is left after a refusal."""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import psycopg
import pytest
from django.db import DatabaseError, OperationalError, connection, models, transaction
from django.test.utils import isolate_apps

import celery_pglock
from celery_pglock import (
    ACCESS_EXCLUSIVE,
    ACCESS_SHARE,
    EXCLUSIVE,
    LockMisuse,
    LockNotAcquired,
    Raise,
    Retry,
    SideEffect,
    Skip,
    model,
    timeout,
)
from celery_pglock.models import SkipCount
from celery_pglock.modes import MODES
from tests.conftest import Rival, wait_until
from tests.models import Entry

ENTRY = "tests_entry"
COUNT = "celery_pglock_skipcount"


def locks_of(rival, pid):
    """The tables that a backend has locked, each with its mode."""
    rows = rival.connection.execute(
        "SELECT n.nspname || '.' || c.relname, l.mode FROM pg_locks AS l JOIN pg_class AS c ON c.oid ="
        " l.relation JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE l.pid = %s AND n.nspname IN"
        " ('public', 'odd', 'ödd \"s') AND c.relkind IN ('r', 'p') AND l.granted ORDER BY 1",
        [pid],
    ).fetchall()
    return {name.removeprefix("public."): mode for name, mode in rows}


def mine(rival):
    return locks_of(rival, connection.connection.info.backend_pid)


def shown():
    with connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        return cursor.fetchone()[0]


@contextmanager
def locked_by(rival, *tables):
    rival.connection.autocommit = False
    try:
        for table in tables:
            rival.connection.execute(f'LOCK TABLE "{table}"')
        yield
    finally:
        rival.connection.rollback()
        rival.connection.autocommit = True


@contextmanager
def table(db_table, *creations):
    """An unmanaged model of a table that is there."""

    class Odd(models.Model):
        class Meta:
            app_label = "tests"
            managed = False

    Odd._meta.db_table = db_table
    with connection.cursor() as cursor:
        for creation in creations:
            cursor.execute(creation)
    yield Odd
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE {connection.ops.quote_name(db_table)}")


@pytest.mark.parametrize(
    "given", [Entry, Entry(), "tests.Entry", "tests.entry"], ids=["class", "instance", "label", "lower"]
)
def test_a_models_table_is_locked_until_the_transaction_ends(rival, given):
    with transaction.atomic():
        assert model(given) is True
        assert mine(rival) == {ENTRY: "AccessExclusiveLock"}
        with pytest.raises(psycopg.errors.LockNotAvailable), rival.connection.transaction():
            rival.connection.execute(f"LOCK TABLE {ENTRY} IN ACCESS SHARE MODE NOWAIT")
    assert mine(rival) == {}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_taken_as_named(rival, mode):
    name = mode.replace(" ", "_")
    assert getattr(celery_pglock, name) == mode
    assert name in celery_pglock.__all__
    with transaction.atomic():
        assert model(Entry, mode=mode)
        assert mine(rival) == {ENTRY: mode.title().replace(" ", "") + "Lock"}


def test_modes_that_do_not_conflict_are_held_together(rival):
    with transaction.atomic(), locked_by(rival):
        rival.connection.execute(f"LOCK TABLE {ENTRY} IN ACCESS SHARE MODE")
        assert model(Entry, mode=EXCLUSIVE, timeout=0)
        assert not model(Entry, mode=ACCESS_EXCLUSIVE, timeout=0)


@pytest.mark.parametrize("wait", [{"timeout": 10}, {"timeout": 0}, {"timeout": None}, {}])
def test_several_are_taken_in_one_order_each_once(rival, wait):
    taken = []

    def note(execute, sql, *arguments):
        if sql.startswith("LOCK"):
            taken.append(sql)
        return execute(sql, *arguments)

    for given in ([Entry, SkipCount, "tests.Entry"], [SkipCount, Entry]):
        with transaction.atomic(), connection.execute_wrapper(note):
            assert model(*given, mode=ACCESS_SHARE, **wait)
            assert mine(rival) == {COUNT: "AccessShareLock", ENTRY: "AccessShareLock"}
        together = "".join(taken)
        assert together.count(ENTRY) == together.count(COUNT) == 1
        assert together.index(COUNT) < together.index(ENTRY)
        taken.clear()


@isolate_apps("tests")
def test_a_proxy_stands_for_its_models_table(rival):
    class Proxy(Entry):
        class Meta:
            proxy = True

    with transaction.atomic():
        assert model(Proxy, Entry)
        assert mine(rival) == {ENTRY: "AccessExclusiveLock"}


@isolate_apps("tests")
def test_a_child_stands_for_its_parents_tables_too(rival):
    class Child(Entry):
        class Meta:
            app_label = "tests"

    class Grandchild(Child):
        class Meta:
            app_label = "tests"

    class Proxy(Grandchild):
        class Meta:
            app_label = "tests"
            proxy = True

    with connection.schema_editor() as editor:
        editor.create_model(Child)
        editor.create_model(Grandchild)
    try:
        with transaction.atomic():
            assert model(Proxy)
            assert set(mine(rival)) == {ENTRY, "tests_child", "tests_grandchild"}
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Grandchild)
            editor.delete_model(Child)


@pytest.mark.parametrize(
    ("db_table", "creations", "relation"),
    [
        ("with space", ['CREATE TABLE "with space" ()'], "with space"),
        ("100%s %(a)s %", ['CREATE TABLE "100%s %(a)s %" ()'], "100%s %(a)s %"),
        ("it's; -- so", ['CREATE TABLE "it\'s; -- so" ()'], "it's; -- so"),
        ("Größe_表", ['CREATE TABLE "Größe_表" ()'], "Größe_表"),
        ("t" * 63, [f"CREATE TABLE {'t' * 63} ()"], "t" * 63),
        ('"odd"."table"', ["CREATE SCHEMA IF NOT EXISTS odd", "CREATE TABLE odd.table ()"], "odd.table"),
        ('odd"."other', ["CREATE SCHEMA IF NOT EXISTS odd", "CREATE TABLE odd.other ()"], "odd.other"),
        ('quoted""inside', ['CREATE TABLE "quoted""inside" ()'], 'quoted"inside'),
        ("SELECT", ['CREATE TABLE "SELECT" ()'], "SELECT"),
    ],
)
def test_odd_table_names_are_locked_as_they_are(rival, db_table, creations, relation):
    creations = [creation.replace("odd.table", 'odd."table"') for creation in creations]
    for wait in (0, 10, None):
        with isolate_apps("tests"), table(db_table, *creations) as odd, transaction.atomic():
            assert model(odd, timeout=wait)
            assert mine(rival) == {relation: "AccessExclusiveLock"}


@pytest.mark.parametrize("db_table", ['a"b', '"a" , "b"', 'x"; DROP TABLE tests_entry; --', '"', '""', '"a'])
@isolate_apps("tests")
def test_a_name_that_django_cannot_quote_is_refused(transactional_db, db_table):
    class Odd(models.Model):
        class Meta:
            app_label = "tests"
            managed = False

    Odd._meta.db_table = db_table
    with transaction.atomic(), pytest.raises(LockMisuse, match="no name that Django can quote"):
        model(Odd)
    assert Entry.objects.count() == 0


class TestRefusals:
    @pytest.mark.parametrize("wait", [0, 0.1, timedelta(milliseconds=100)])
    def test_false_is_returned_and_the_transaction_goes_on(self, rival, wait):
        with locked_by(rival, ENTRY), transaction.atomic():
            Entry.objects.none().count()
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL lock_timeout = '7s'")
            assert model(SkipCount, Entry, timeout=wait) is False
            assert shown() == "7s"
            other = Rival()
            assert mine(other) == {}
            other.connection.close()
        with transaction.atomic():
            assert model(Entry, SkipCount, timeout=wait) is True
        assert shown() == "0"

    @pytest.mark.parametrize(("wait", "reason"), [(0, "it is taken"), (0.1, "lock_timeout ran out")])
    def test_raise_names_tables_and_reason_and_may_be_caught_in_the_transaction(self, rival, wait, reason):
        with locked_by(rival, ENTRY), transaction.atomic():
            with pytest.raises(LockNotAcquired, match=reason) as refused:
                model(Entry, SkipCount, timeout=wait, side_effect=Raise)
            assert isinstance(refused.value, OperationalError)
            assert refused.value.lock == f"{COUNT}, {ENTRY}"
            assert refused.value.waited >= wait
            assert mine(rival) == {}
            assert shown() == "0"

    def test_a_slow_answer_to_who_did_not_want_to_wait_is_no_wait(self, rival):
        def slowly(execute, *question):
            time.sleep(0.02)
            return execute(*question)

        with locked_by(rival, ENTRY), transaction.atomic(), connection.execute_wrapper(slowly):
            with pytest.raises(LockNotAcquired, match="without waiting") as refused:
                model(Entry, timeout=0, side_effect=Raise)
            assert refused.value.waited == 0

    def test_a_side_effect_of_your_own_is_asked(self, rival):
        seen = []

        class Note(SideEffect):
            def on_conflict(self, conflict):
                seen.append((conflict.key, conflict.reason, conflict.holders))

        with locked_by(rival, ENTRY), transaction.atomic():
            assert model(Entry, timeout=0, side_effect=Note()) is False
        assert seen == [(ENTRY, "it is taken", ())]

    def test_the_timeout_covers_all_tables_together(self, rival):
        started = time.monotonic()
        with locked_by(rival, COUNT), locked_by(later := Rival(), ENTRY), transaction.atomic():
            stepping_aside = threading.Timer(1.5, rival.connection.rollback)
            stepping_aside.start()
            assert not model(Entry, SkipCount, timeout=2)
            stepping_aside.join()
        later.connection.close()
        assert 2 <= time.monotonic() - started < 3.3

    def test_unset_it_waits_as_the_lock_timeout_in_force_says(self, rival):
        with locked_by(rival, ENTRY):
            with timeout(0.1), transaction.atomic():
                assert not model(Entry)
            with transaction.atomic(), timeout(0.1):
                assert not model(Entry)
                assert shown() == "100ms"

    def test_for_ever_is_longer_than_the_lock_timeout_in_force(self, rival):
        waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{ENTRY}'::regclass"
        with locked_by(rival, ENTRY), timeout(0.1), transaction.atomic():

            def step_aside():
                other = Rival()
                wait_until(lambda: other.ask(waits))
                time.sleep(0.3)
                other.connection.close()
                rival.connection.rollback()

            stepping_aside = threading.Thread(target=step_aside)
            stepping_aside.start()
            assert model(Entry, timeout=None)
            stepping_aside.join()

    def test_the_victim_of_a_deadlock_is_refused(self, rival):
        rival.connection.execute("SET deadlock_timeout = '20s'")
        with locked_by(rival, ENTRY), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL deadlock_timeout = '50ms'")
            assert model(SkipCount)
            waiting = threading.Thread(target=lambda: rival.connection.execute(f"LOCK TABLE {COUNT}"))
            waiting.start()
            other = Rival()
            wait_until(
                lambda: other.ask(
                    f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{COUNT}'::regclass"
                )
            )
            with pytest.raises(LockNotAcquired, match="deadlock"):
                model(Entry, timeout=20, side_effect=Raise)
            assert mine(other) == {COUNT: "AccessExclusiveLock"}
            other.connection.close()
            transaction.set_rollback(True)
        waiting.join()

    def test_an_interrupted_wait_leaves_nobody_who_waits(self, rival):
        class Interrupted(Exception):
            pass

        def interrupt(*_):
            raise Interrupted

        waits = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{ENTRY}'::regclass"
        before = signal.signal(signal.SIGUSR1, interrupt)
        other = Rival()

        def send():
            wait_until(lambda: other.ask(waits))
            os.kill(os.getpid(), signal.SIGUSR1)

        sending = threading.Thread(target=send)
        try:
            with locked_by(rival, ENTRY):
                with pytest.raises(Interrupted), transaction.atomic():
                    sending.start()
                    model(Entry, timeout=60)
                sending.join()
                wait_until(lambda: not other.ask(waits), seconds=5)
        finally:
            signal.signal(signal.SIGUSR1, before)
            other.connection.close()
        assert shown() == "0"

    def test_a_statement_that_is_cancelled_is_no_refusal(self, rival):
        with locked_by(rival, ENTRY), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 100")
            with pytest.raises(OperationalError, match="statement timeout") as ended:
                model(Entry, timeout=20)
            assert not isinstance(ended.value, LockNotAcquired)
            assert shown() == "0"

    @isolate_apps("tests")
    def test_a_table_that_is_not_there_is_no_refusal(self, transactional_db):
        class Missing(models.Model):
            class Meta:
                app_label = "tests"
                managed = False

        with transaction.atomic(), pytest.raises(DatabaseError, match="does not exist"):
            model(Missing, timeout=0)

    def test_a_backend_that_is_terminated_is_no_refusal(self, rival):
        with suppress(DatabaseError), locked_by(rival, ENTRY), transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                pid = cursor.fetchone()[0]
            other = Rival()

            def terminate():
                wait_until(
                    lambda: (
                        other.ask("SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s", pid)
                        == "Lock"
                    )
                )
                other.ask("SELECT pg_terminate_backend(%s)", pid)

            terminating = threading.Thread(target=terminate)
            terminating.start()
            with pytest.raises(OperationalError) as ended:
                model(Entry, timeout=20)
            terminating.join()
            other.connection.close()
            assert not isinstance(ended.value, LockNotAcquired)


@isolate_apps("tests")
def test_misuse_is_refused_with_the_cure(transactional_db, settings):
    class Abstract(models.Model):
        class Meta:
            app_label = "tests"
            abstract = True

    settings.TESTS_REPLACED = "tests.Entry"

    class Replaced(models.Model):
        class Meta:
            app_label = "tests"
            swappable = "TESTS_REPLACED"

    def refused(cure, *given, **options):
        with transaction.atomic(), pytest.raises(LockMisuse, match=cure) as error:
            model(*given, **options)
        assert isinstance(error.value, ValueError)

    refused("at least one model")
    refused("Abstract is abstract, so it has no table", Abstract)
    refused("Replaced is swapped for tests.Entry", Replaced)
    refused("is no model", models.Model)
    refused("is no model", int)
    refused("is no model", [Entry])
    refused("is no model", Entry.objects)
    refused(r"no model 'tests.Entri'. Did you mean 'tests.Entry'\?", "tests.Entri")
    refused(r"no model 'Entry'. Did you mean 'tests.Entry'\?", "Entry")
    refused(r"no model 'a.b.c'", "a.b.c")
    refused(r"not 'access exclusive'. Did you mean 'ACCESS EXCLUSIVE'\?", Entry, mode="access exclusive")
    refused(r"Did you mean 'ROW SHARE'\?", Entry, mode="ROW_SHARE")
    refused("mode must be one of", Entry, mode="SHARE; DROP TABLE tests_entry")
    refused("mode must be one of", Entry, mode=None)
    refused("Skip cannot be done here", Entry, side_effect=Skip)
    refused("Retry cannot be done here", Entry, side_effect=Retry())
    refused("must be a side effect", Entry, side_effect="Return")
    refused("timeout must be", Entry, timeout=-1)
    refused("timeout must be", Entry, timeout=True)
    refused(r"Did you mean 'default'\?", Entry, using="defaults")
    refused("not PostgreSQL but sqlite", Entry, using="sqlite")


def test_outside_of_a_transaction_it_is_refused(transactional_db):
    with pytest.raises(RuntimeError, match=r"inside of transaction\.atomic"):
        model(Entry)


def test_without_autocommit_there_is_a_transaction(rival):
    connection.set_autocommit(False)
    try:
        assert model(Entry, timeout=1)
        assert mine(rival) == {ENTRY: "AccessExclusiveLock"}
        transaction.rollback()
    finally:
        connection.set_autocommit(True)


def test_where_locks_are_turned_off_none_is_taken(rival, pglock_settings):
    pglock_settings(ENABLED=False)
    with transaction.atomic():
        assert model(Entry)
        connection.ensure_connection()
        assert mine(rival) == {}
