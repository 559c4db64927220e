"""Moving from another library: its locks and ours exclude each other, and the pages say how."""

import hashlib
import random
import re
import threading
import zlib
from pathlib import Path

import pytest
from celery import Celery
from django.db import OperationalError, connection, connections, transaction

import celery_pglock
from celery_pglock import (
    ExclusiveLock,
    LockMisuse,
    LockNotAcquired,
    LockNotHeld,
    ShareLock,
    Skip,
    advisory,
    advisory_id,
    timeout,
)
from celery_pglock.keys import key
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock
from tests.conftest import Rival, wait_until
from tests.models import Entry

PAGES = Path(__file__).parent.parent / "docs" / "how-to"

RANDOM = random.Random(7)
TEXTS = [
    "import",
    "import:42",
    "my_module.my_exclusive_function",
    "plumless",
    "buckeroo",
    " ",
    "0",
    "%s %d {x}",
    "a'b\"c\\d;--",
    "tab\tand\nline",
    "größe",
    "价格:更新",
    "\U0001f512",
    "e\u0301",
    "\u00e9",
    "\0",
    "x" * 5000,
    *("".join(chr(RANDOM.randrange(32, 0xD800)) for _ in range(RANDOM.randrange(1, 40))) for _ in range(200)),
]
# One text that each of the other hashes takes to a negative number, and one that it does not.
BOTH_SIGNS = ["import", "import:42", "report", "größe"]

LOCKS_OF_A_BACKEND = (
    "SELECT classid::bigint, objid::bigint, objsubid FROM pg_locks"
    " WHERE locktype = 'advisory' AND granted AND pid = %s"
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / page).read_text(), re.DOTALL | re.MULTILINE)


class App(Celery):
    """Celery knows a task by its name: each block of a page has an app of its own."""

    def __init__(self):
        super().__init__("moving", set_as_current=False, broker="memory://")

    def task(self, *args, **options):
        # A shared one would be a task of the tests' own app, too.
        return super().task(*args, **{**options, "shared": False})


def run(page):
    """Run the Python blocks of a page, one after the other as one module; give what each left."""
    names = {"__name__": "reports.tasks", "Order": Entry}
    left = []
    for block in blocks(page, "python"):
        names["app"] = App()
        exec(compile(block, page, "exec"), names)  # noqa: S102 - the page is what is tested
        left.append(dict(names))
    return left


def crc32_of_django_pglocks(text):
    positive = zlib.crc32(text.encode("utf-8"))
    number = (2**31 - 1) & positive
    return number - 2**31 if positive & 2**31 else number


def sha256_of_django_pgware(text):
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], byteorder="big", signed=True)


def sha256_of_django_pglock(text):
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little", signed=True)


def from_page(name):
    page = {"moving": run("move-from-django-pglocks.md")[-1]}
    return page["moving"][name]


class Peer:
    """How another library takes a lock on a text: its number, its statement, and what stands for it here."""

    def __init__(self, number, statement, ours):
        self.number = number
        self._statement = statement
        self.ours = ours

    def call(self, rival, function, text):
        return self._statement(rival, function, self.number(text))


PEERS = {
    "django-pglock": Peer(
        sha256_of_django_pglock,
        lambda rival, function, number: rival.ask(f"SELECT {function}({number})"),
        lambda text: text,
    ),
    "django-pglocks": Peer(
        crc32_of_django_pglocks,
        lambda rival, function, number: rival.ask(f"SELECT {function}({number})"),
        from_page("crc32_id"),
    ),
    "django-pgware": Peer(
        sha256_of_django_pgware,
        lambda rival, function, number: rival.ask(f"SELECT {function}(%s) -- 'x' @ y.py:1", number),
        from_page("sha256_id"),
    ),
}


@pytest.fixture(params=PEERS)
def peer(request):
    return PEERS[request.param]


def rows(rival, pid):
    return set(rival.connection.execute(LOCKS_OF_A_BACKEND, [pid]).fetchall())


def rows_of_ours(rival):
    return {
        row
        for lock in PGLock.objects.filter(type="ADVISORY", activity__application_name="pglock")
        for row in rows(rival, lock.activity_id)
    }


class TestKeys:
    def test_pg_locks_prints_the_same_rows_for_texts_of_all_kinds(self, rival, peer):
        for text in TEXTS:
            assert peer.call(rival, "pg_try_advisory_lock", text) is True
        theirs = rows(rival, rival.ask("SELECT pg_backend_pid()"))
        assert len(theirs) >= len(set(TEXTS)) - 1
        rival.ask("SELECT pg_advisory_unlock_all()::text")
        with ExclusiveLock(*map(peer.ours, TEXTS)):
            assert rows_of_ours(rival) == theirs

    @pytest.mark.parametrize("text", BOTH_SIGNS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_what_the_other_library_holds_is_not_had_here(self, rival, peer, text, shared):
        suffix = "_shared" if shared else ""
        assert peer.call(rival, f"pg_try_advisory_lock{suffix}", text) is True
        assert advisory(peer.ours(text), timeout=0).acquire() is False
        with advisory(peer.ours(text), timeout=0, shared=True) as acquired:
            assert acquired is shared
        assert peer.call(rival, f"pg_advisory_unlock{suffix}", text) is True
        with advisory(peer.ours(text), timeout=0) as acquired:
            assert acquired

    @pytest.mark.parametrize("text", BOTH_SIGNS)
    @pytest.mark.parametrize("xact", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    def test_what_is_held_here_the_other_library_does_not_get(self, rival, peer, text, xact, shared):
        with advisory(peer.ours(text), xact=xact, shared=shared) as acquired:
            assert acquired
            assert peer.call(rival, "pg_try_advisory_lock", text) is False
            assert peer.call(rival, "pg_try_advisory_xact_lock", text) is False
            assert peer.call(rival, "pg_try_advisory_lock_shared", text) is shared
        if shared:
            assert peer.call(rival, "pg_advisory_unlock_shared", text) is True
        assert peer.call(rival, "pg_try_advisory_lock", text) is True

    def test_who_waits_in_the_other_library_comes_next_here(self, rival, peer):
        def waits():
            try:
                peer.call(rival, "pg_advisory_lock", "import")
                return True
            finally:
                peer.call(rival, "pg_advisory_unlock", "import")

        somebody = Rival()
        results = []
        waiting = threading.Thread(target=lambda: results.append(waits()))
        with advisory(peer.ours("import")):
            waiting.start()
            wait_until(lambda: somebody.sees_held(peer.ours("import"), granted=False))
            assert not results
        waiting.join()
        somebody.connection.close()
        assert results == [True]

    def test_an_empty_text_is_an_error(self, peer):
        with pytest.raises(ValueError, match="empty"):
            advisory(peer.ours(""))

    def test_an_empty_text_was_the_number_0_in_django_pglocks(self, rival):
        PEERS["django-pglocks"].call(rival, "pg_try_advisory_lock", "")
        assert not advisory(0, timeout=0).acquire()

    def test_the_three_libraries_do_not_exclude_each_other(self):
        assert len({peer.number("import") for peer in PEERS.values()}) == 3

    def test_two_texts_that_are_one_lock_in_django_pglocks_are_one_here(self, rival):
        crc32_id = PEERS["django-pglocks"].ours
        PEERS["django-pglocks"].call(rival, "pg_try_advisory_lock", "plumless")
        assert not advisory(crc32_id("buckeroo"), timeout=0).acquire()
        assert advisory_id("plumless") != advisory_id("buckeroo")

    @pytest.mark.parametrize("number", [0, 1, -1, 2**31, -(2**31), 2**62, -(2**62)])
    def test_a_number_is_itself(self, rival, number):
        assert rival.ask(f"SELECT pg_try_advisory_lock({number})") is True
        assert not advisory(number, timeout=0).acquire()

    def test_a_pair_is_itself(self, rival):
        assert rival.ask("SELECT pg_try_advisory_lock(1, -2)") is True
        assert not advisory((1, -2), timeout=0).acquire()

    def test_both_halves_are_unsigned_here(self):
        for text in TEXTS:
            number = sha256_of_django_pglock(text)
            assert advisory_id(text) == ((number >> 32) % 2**32, number & 0xFFFFFFFF)


# How py-postgresql's library of statements does it.
ALOCK = """
SELECT CASE WHEN ($2::int8[])[i] IS NULL THEN pg_catalog.{name}(($1::int4[])[i][1], $1[i][2])
       ELSE pg_catalog.{name}($2[i]) END
FROM pg_catalog.generate_series(1, COALESCE(array_upper($2::int8[], 1), array_upper($1::int4[], 1))) AS g(i)
"""


def alock(rival, function, identifiers):
    pairs = [list(one) if isinstance(one, tuple) else [None, None] for one in identifiers]
    numbers = [one if isinstance(one, int) else None for one in identifiers]
    sql = ALOCK.format(name=function).replace("$1", "%(pairs)s").replace("$2", "%(numbers)s")
    # psycopg numbers what it is given twice only once, as the original has it.
    return [row[0] for row in rival.connection.execute(sql, {"pairs": pairs, "numbers": numbers})]


class TestALock:
    IDENTIFIERS = ((192842, 0), 7, (0, 0), 0, 1, -(2**63), (-1, 2**31 - 1))

    def test_pg_locks_prints_the_same_rows(self, rival):
        assert all(alock(rival, "pg_try_advisory_lock", self.IDENTIFIERS))
        theirs = rows(rival, rival.ask("SELECT pg_backend_pid()"))
        assert all(alock(rival, "pg_advisory_unlock", self.IDENTIFIERS))
        with ExclusiveLock(*self.IDENTIFIERS):
            assert rows_of_ours(rival) == theirs
            assert len(theirs) == len(self.IDENTIFIERS)

    @pytest.mark.parametrize("identifier", IDENTIFIERS)
    def test_each_library_keeps_the_other_out(self, rival, identifier):
        assert alock(rival, "pg_try_advisory_lock", [identifier]) == [True]
        assert not ShareLock(identifier).acquire(blocking=False)
        assert alock(rival, "pg_advisory_unlock", [identifier]) == [True]
        assert alock(rival, "pg_try_advisory_lock_shared", [identifier]) == [True]
        with ShareLock(identifier):
            assert not ExclusiveLock(identifier, 99).acquire(blocking=False)
            assert alock(rival, "pg_advisory_unlock_shared", [identifier]) == [True]
            assert alock(rival, "pg_try_advisory_lock", [identifier]) == [False]

    def test_the_page_runs(self, rival):
        first, last = run("move-from-postgresql-alock.md")
        assert first["lock"] == ExclusiveLock((192842, 0), (192849, 0))
        task = last["rebuild_tables"]
        assert task.apply().state == "SUCCESS"
        alock(rival, "pg_try_advisory_lock", [(192849, 0)])
        assert task.apply().state == "RETRY"

    def test_what_the_page_names_is_there(self):
        lock = ExclusiveLock(1, (2, 3))
        assert (lock.identifiers, lock.using, lock.shared, lock.locked()) == (
            (1, (2, 3)),
            "default",
            False,
            False,
        )
        for misuse in ([2, 3], True, 2**63):
            with pytest.raises(LockMisuse):
                ExclusiveLock(misuse)


class TestFromDjangoPglocks:
    def test_a_task_that_makes_its_key_excludes_the_old_code(self, rival):
        task = run("move-from-django-pglocks.md")[2]["import_account"]
        theirs = PEERS["django-pglocks"]
        theirs.call(rival, "pg_try_advisory_lock", "import:7")
        assert task.apply([7]).state == "RETRY"
        assert task.apply([8]).state == "SUCCESS"
        theirs.call(rival, "pg_advisory_unlock", "import:7")
        assert task.apply([7]).state == "SUCCESS"

    @pytest.mark.parametrize("held", ["the old key", "the new key"])
    def test_on_the_way_to_texts_both_keys_are_held(self, rival, held):
        *_, both, text = run("move-from-django-pglocks.md")
        task = both["export_account"]
        crc32_id = both["crc32_id"]
        assert text["export_account"].lock_for(7) == advisory("export:7", timeout=0)
        assert task.apply([7]).state == "SUCCESS"
        rival.take(crc32_id("export:7") if held == "the old key" else "export:7")
        assert task.apply([7]).state == "RETRY"
        assert task.apply([8]).state == "SUCCESS"

    def test_a_list_in_lock_key_is_two_keys(self):
        @App().task(base=celery_pglock.AdvisoryTask, lock_key=[1, 2])
        def task():
            pass

        assert task.lock_for().keys == (key(1), key(2))

    def test_a_decorated_function_does_not_run_without_its_lock(self, rival):
        rival.take(7)
        with pytest.raises(LockNotAcquired):
            advisory(7, timeout=0)(lambda: pytest.fail("it must not run"))()
        assert advisory(7, timeout=0, side_effect=Skip)(lambda: pytest.fail("it must not run"))() is None


class TestFromDjangoPglock:
    def test_the_page_runs(self, rival):
        run("move-from-django-pglock.md")

    def test_every_name_of_the_package_is_here(self):
        names = "advisory advisory_id model prioritize timeout Cancel Terminate PrioritizeSideEffect"
        names += (
            " Raise Return Skip SideEffect ACCESS_EXCLUSIVE ACCESS_SHARE EXCLUSIVE ROW_EXCLUSIVE ROW_SHARE"
        )
        names += " SHARE SHARE_ROW_EXCLUSIVE SHARE_UPDATE_EXCLUSIVE"
        assert not set(names.split()) - set(celery_pglock.__all__)

    def test_a_task_without_a_name_has_the_key_of_its_decorated_function(self, rival):
        task = run("move-from-django-pglock.md")[1]["nightly_report"]
        PEERS["django-pglock"].call(rival, "pg_try_advisory_lock", "reports.tasks.nightly_report")
        assert task.apply().state == "SUCCESS"
        assert not task.lock_for().explain().would_run

    @pytest.mark.parametrize("timeout", [0, 0.1])
    def test_a_run_that_takes_a_key_through_both_meets_itself(self, rival, timeout):
        number = sha256_of_django_pglock("import")
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT pg_advisory_lock({number})")
            with advisory("import", timeout=timeout) as acquired:
                assert not acquired
            cursor.execute(f"SELECT pg_advisory_unlock({number})")
            with advisory("import"):
                cursor.execute(f"SELECT pg_try_advisory_lock({number})")
                assert cursor.fetchone() == (False,)

    def test_the_two_kinds_of_lock_live_on_two_sessions_and_each_re_enters(self, rival):
        with transaction.atomic():
            with advisory("import"):
                with pytest.raises(LockMisuse, match="wait for itself"):
                    advisory("import", xact=True, timeout=0).acquire()
                with advisory("import", timeout=0) as acquired:
                    assert acquired
            assert advisory("import", xact=True).acquire()
            assert advisory("import", xact=True, timeout=0).acquire()
            assert not advisory("import", timeout=0).acquire()

    def test_a_set_on_djangos_connection_does_not_bound_the_wait_and_timeout_does(self, rival):
        rival.take("import")
        results = []

        def code():
            with connection.cursor() as cursor:
                cursor.execute("SET lock_timeout = '50ms'; SET statement_timeout = '50ms'")
            results.append(advisory("import").acquire())
            advisory("import").release()
            connections.close_all()

        waiting = threading.Thread(target=code)
        waiting.start()
        look = (
            "SELECT clock_timestamp() - waitstart > '200ms' FROM pg_locks WHERE locktype = 'advisory' AND NOT"
            " granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        wait_until(lambda: rival.ask(look))
        rival.give_back("import")
        waiting.join()
        assert results == [True]
        rival.take("import")
        with timeout(0.05), advisory("import") as acquired:
            assert not acquired

    def test_a_wait_that_ends_leaves_the_block_without_the_lock_unless_it_raises(self, rival):
        rival.take("import")
        with timeout(0.05):
            with advisory("import") as acquired:
                assert not acquired
            with pytest.raises(OperationalError):
                run("move-from-django-pglock.md")

    def test_0_is_an_id_and_a_flag_is_none(self, rival):
        with advisory(0):
            assert not rival.could_take(0)
        for misuse in (lambda: advisory(True), lambda: advisory(False), lambda: advisory("")):
            with pytest.raises(LockMisuse):
                misuse()

    @pytest.mark.parametrize("misuse", [lambda: advisory(1.5), lambda: advisory("x", timeout="1")])
    def test_a_wrong_argument_is_a_value_error_and_no_type_error(self, misuse):
        with pytest.raises(ValueError, match="1") as refused:
            misuse()
        assert not isinstance(refused.value, TypeError)

    def test_a_release_too_many_is_told(self, rival):
        with pytest.raises(LockNotHeld):
            advisory("import").release()

    def test_the_same_lock_releases_what_was_acquired(self, rival):
        assert advisory("import", timeout=0).acquire()
        with pytest.raises(LockNotHeld):
            advisory("import", shared=True).release()
        advisory("import").release()
        assert rival.could_take("import")

    def test_pid_gives_the_waits_of_a_backend_and_stops_tell_what_became_of_it(self, rival):
        rival.take("import")
        pid = rival.ask("SELECT pg_backend_pid()")
        waiting = threading.Thread(target=lambda: advisory("import", timeout=5).acquire())
        waiting.start()
        wait = wait_until(lambda: BlockedPGLock.objects.first())
        assert not BlockedPGLock.objects.pid(pid).exists()
        (stop,) = BlockedPGLock.objects.pid(wait.activity_id).cancel_blocking_activity()
        assert (stop.pid, stop.outcome, stop.is_done) == (pid, "idle", False)
        (stop,) = PGLock.objects.pid(pid).terminate_activity()
        assert (stop.pid, stop.outcome, stop.is_done) == (pid, "terminated", True)
        waiting.join()
        for choose_everything in (BlockedPGLock.objects.pid, PGLock.objects.pid, PGLock.objects.on):
            with pytest.raises(LockMisuse):
                choose_everything()

    def test_context_is_read_and_not_filtered(self, rival):
        rival.connection.execute('/*pga_context={"user": 7}*/\nSELECT 1')
        pid = rival.connection.info.backend_pid
        assert PGActivity.objects.get(pk=pid).context == {"user": 7}
        with pytest.raises(LockMisuse):
            list(PGLock.objects.filter(activity__context="x"))


class TestWithoutAGap:
    PAGE = "move-without-a-gap.md"

    def test_the_page_runs_and_finds_the_locks_of_others_alone(self, rival, capsys):
        PEERS["django-pglocks"].call(rival, "pg_try_advisory_lock", "import:7")
        pid = rival.connection.info.backend_pid
        with advisory("ours"), ExclusiveLock(5):
            found = run(self.PAGE)[-1]["left"]
            assert [lock.activity_id for lock in found] == [pid]
            assert (found[0].classid, found[0].objid) == advisory_id(crc32_of_django_pglocks("import:7"))
            with connection.cursor() as cursor:
                (sql,) = blocks(self.PAGE, "sql")
                cursor.execute(sql)
                assert [row[0] for row in cursor.fetchall()] == [pid]
        assert str(pid) in capsys.readouterr().out

    def test_names_that_are_not_shown_do_not_make_ours_others(self, rival, pglock_settings, capsys):
        pglock_settings(SHOW_NAMES=False)
        with advisory("ours"):
            assert not run(self.PAGE)[-1]["left"].exists()

    def test_what_is_left_can_be_ended(self, rival, capsys):
        rival.take("import:7")
        (stop,) = run(self.PAGE)[-1]["left"].terminate_activity()
        assert stop.is_done
        with advisory("import:7", timeout=0) as acquired:
            assert acquired

    def test_transaction_level_locks_by_hand_are_found_too(self, rival, capsys):
        with advisory("by hand", xact=True):
            assert run(self.PAGE)[-1]["left"].count() == 1

    def test_advisory_sorts_its_keys(self):
        assert advisory(2, 1).keys == (key(1), key(2))

    def test_of_a_limit_the_other_library_takes_the_first_slot_alone(self, rival):
        PEERS["django-pglock"].call(rival, "pg_try_advisory_lock", "export")
        with advisory("export", limit=2, timeout=0) as acquired:
            assert acquired
            assert not advisory("export", timeout=0).acquire()
