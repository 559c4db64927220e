"""What the test kit tells and does, in this process."""

import threading
import time
import unittest
import warnings

import pytest
from celery import Celery, uuid
from celery.app.trace import build_tracer
from django.conf import settings
from django.db import DatabaseError, connections
from django.test import SimpleTestCase, TestCase, override_settings

from celery_pglock import (
    AdvisoryTask,
    ExclusiveLock,
    LockLost,
    LockMisuse,
    LockNotAcquired,
    LockNotHeld,
    advisory,
    leftovers,
)
from celery_pglock.pool import pool
from celery_pglock.testing import (
    LocksLeftBehind,
    assert_raised,
    assert_ran,
    assert_retried,
    assert_skipped,
    close_lock_sessions,
    held_elsewhere,
    lock_free,
    locks_off,
)
from tests.celery_app import app
from tests.conftest import LOCK_SESSIONS, in_another_thread, wait_until
from tests.test_sessions import statements_logged_by_the_server
from tests.worker_tasks import at_most_three, in_transaction, raises, retries, skips

# Tasks of other tests' workers are none of these.
kit = Celery("kit", set_as_current=False, broker=settings.CELERY_BROKER_URL)


@kit.task(shared=False, base=AdvisoryTask, lock_key="shelf", lock_shared=True)
def reads():
    return "read"


@kit.task(shared=False, base=AdvisoryTask, lock_key="elsewhere", lock_using="locks")
def on_another_alias():
    return "done"


@kit.task(shared=False, base=AdvisoryTask, lock_key="on sqlite", lock_using="sqlite", lock_xact=True)
def on_sqlite():
    return "done"


@kit.task(shared=False)
def without_a_lock():
    return "done"


def said_by(expected, task, do, **options):
    """What the assertion said."""
    with pytest.raises(AssertionError) as caught, expected(task, **options):
        do()
    return str(caught.value)


def deliver(task):
    """Run it as a worker in this thread would, for a message of its own."""
    task_id = uuid()
    request = {"id": task_id, "delivery_info": {"routing_key": "nobody's"}, "ignore_result": True}
    build_tracer(task.name, task, app=kit)(task_id, (), {}, request)
    with app.connection_for_write() as broker:
        broker.default_channel.queue_purge("nobody's")


class TestHeldElsewhere:
    def test_a_lock_with_a_limit_is_held_in_all_its_places(self, rival):
        with held_elsewhere(at_most_three.lock_for("k")), assert_retried(at_most_three):
            at_most_three.apply(["k"])

    @pytest.mark.django_db(transaction=True, databases=["default", "locks"])
    def test_a_lock_is_held_on_its_own_alias(self, rival):
        with (
            held_elsewhere(on_another_alias.lock_for(), "k"),
            assert_retried(on_another_alias),
            assert_skipped(skips),
        ):
            assert {session.alias for session in pool().in_use()} == {"default", "locks"}
            on_another_alias.apply()
            skips.apply(["k"])
        connections["locks"].close()

    def test_it_is_held_for_longer_than_a_lease(self, rival, pglock_settings):
        pglock_settings(LEASE=1)
        with held_elsewhere("k"):
            time.sleep(1.5)
            assert rival.sees_held("k")

    def test_who_has_it_already_is_told(self, rival):
        rival.take("k")
        with pytest.raises(LockNotAcquired, match=r"lock 'k' .*; held by .*backend \d+"), held_elsewhere("k"):
            pass

    @pytest.mark.parametrize("function", [held_elsewhere, lock_free])
    def test_what_is_no_key_is_refused(self, function, rival):
        for nonsense in ("", 1.5, ("a", "b"), None):
            with pytest.raises(LockMisuse, match="is not a lock id"), function(nonsense):
                pass
        with pytest.raises(LockMisuse, match="needs a lock id"), function():
            pass
        with (
            pytest.raises(LockMisuse, match=r"tests\.worker_tasks\.skips\.lock_for\(\.\.\.\)"),
            function(skips),
        ):
            pass

    @pytest.mark.parametrize("function", [held_elsewhere, lock_free])
    def test_a_test_without_the_database_is_refused(self, function):
        with pytest.raises(RuntimeError, match="Database access not allowed"), function("k"):
            pass


class TestWithoutTheDatabase(SimpleTestCase):
    def test_a_simple_test_case_is_refused(self):
        with pytest.raises(AssertionError, match="Database queries to 'default' are not allowed"):
            lock_free("k")


class TestLockFree:
    def test_what_another_session_holds_is_not_free(self, rival):
        assert lock_free("k")
        rival.take("k")
        assert not lock_free("k")
        assert not lock_free("free", "k")
        assert lock_free("free")

    def test_what_the_caller_holds_is_not_free(self, rival):
        with advisory("k"):
            assert not lock_free("k")
        assert lock_free("k")

    def test_shared_holders_leave_room_for_shared_ones_alone(self, rival):
        rival.take("shelf", shared=True)
        assert lock_free("shelf", shared=True)
        assert lock_free(reads.lock_for())
        assert not lock_free("shelf")

    def test_a_lock_with_a_limit_is_free_while_a_place_is(self, rival):
        lock = at_most_three.lock_for("k")
        first, second, third = lock.keys[0].slots(3)
        rival.take(first)
        rival.take(second)
        assert lock_free(lock)
        rival.take(third)
        assert not lock_free(lock)

    def test_it_takes_nothing(self, rival):
        with advisory("another"):
            session = pool().leased["default"]
            logged = statements_logged_by_the_server(session._line.connection, lambda: lock_free("k"))
        assert logged
        assert not [line for line in logged if "pg_try_advisory" in line or "pg_advisory" in line]


class TestAssertions:
    def test_they_give_what_they_have_seen(self, rival):
        with assert_ran(skips) as locks:
            skips.apply(["k"])
        assert [lock.name for lock in locks] == ["k"]
        with held_elsewhere("k"), assert_skipped(skips.name, times=2) as conflicts:
            skips.apply(["k"])
            skips.apply(["k"])
        assert [conflict.key for conflict in conflicts] == ["k", "k"]
        assert conflicts[0].holders[0].worker == "held_elsewhere"
        with held_elsewhere("k"), assert_retried(retries) as conflicts:
            retries.apply(["k"])
        assert conflicts[0].attempt == 1

    def test_one_that_raised_may_leave_the_block(self, rival):
        with held_elsewhere("k"), assert_raised(raises) as conflicts:
            raises.apply(["k"]).get()
        assert conflicts[0].error().lock == "k"
        with pytest.raises(LockNotAcquired, match="of another"), assert_raised(raises):
            raise LockNotAcquired("of another")
        with pytest.raises(LockNotAcquired), held_elsewhere("k"), assert_skipped(raises):
            raises.apply(["k"]).get()

    def test_an_error_of_the_block_is_not_hidden(self, rival):
        with pytest.raises(KeyError), assert_skipped(skips):
            raise KeyError

    def test_that_it_ran_is_told(self, rival):
        assert said_by(assert_skipped, skips, lambda: skips.apply(["k"])) == (
            "tests.worker_tasks.skips was to be skipped once, and was not: "
            "it ran under lock 'k', which nobody else held."
        )

    def test_another_outcome_is_told_with_the_holder(self, rival):
        with held_elsewhere("k"):
            told = said_by(assert_skipped, retries, lambda: retries.apply(["k"]))
            assert "and was not: it was retried: lock 'k' was not acquired" in told
            assert "held_elsewhere" in told
            told = said_by(assert_ran, skips, lambda: skips.apply(["k"]))
            assert "was to run once, and did not: it was skipped: lock 'k'" in told
            told = said_by(assert_retried, raises, lambda: raises.apply(["k"]))
            assert "was to be retried once, and was not: it raised: lock 'k'" in told

    def test_another_number_of_times_is_told(self, rival):
        def twice():
            skips.apply(["k"])
            skips.apply(["k"])

        with held_elsewhere("k"):
            assert "was to be skipped once, and was twice: it was skipped" in said_by(
                assert_skipped, skips, twice
            )
            assert "was to be skipped 3 times, and was twice:" in said_by(
                assert_skipped, skips, twice, times=3
            )
        with assert_skipped(skips, times=0):
            skips.apply(["k"])

    def test_that_it_was_never_called_is_told_with_what_was(self, rival):
        assert said_by(assert_ran, "misspelt", lambda: skips.apply(["k"])).endswith(
            "no worker and no eager call ran it in this process; called were tests.worker_tasks.skips."
        )

    def test_that_it_was_only_sent_is_told(self, rival):
        told = said_by(assert_ran, skips, lambda: skips.apply_async(["k"], queue="nobody's"))
        app.control.purge()
        with app.connection_for_write() as broker:
            broker.default_channel.queue_purge("nobody's")
        assert told.endswith("it was sent to the broker, and no worker of this process has run it.")

    def test_that_it_has_no_lock_is_told(self, db):
        told = said_by(assert_ran, without_a_lock, without_a_lock.apply)
        assert "it ran without a lock, as it states none (is its base class AdvisoryTask?" in told
        with locks_off():
            told = said_by(assert_skipped, skips, lambda: skips.apply(["k"]))
        assert told.endswith("it ran without a lock, as CELERY_PGLOCK['ENABLED'] is False.")

    def test_that_it_failed_before_is_told(self, db):
        told = said_by(assert_ran, skips, lambda: skips.apply([]))
        assert "it failed before it had a lock: TypeError(" in told

    def test_that_no_lock_could_be_taken_is_told(self, rival):
        away = {**connections.databases["default"], "PORT": 1}
        connections.databases["away"] = away

        @kit.task(shared=False, base=AdvisoryTask, lock_using="away")
        def meets_an_outage():
            pass

        try:
            told = said_by(assert_ran, meets_an_outage, lambda: deliver(meets_an_outage))
        finally:
            del connections.databases["away"]
        assert "it comes back, as no lock can be taken: " in told

    def test_what_is_no_task_is_refused(self):
        with pytest.raises(LockMisuse, match="neither a task nor the name of one"):
            assert_skipped(5)

    def test_another_thread_is_seen(self, rival):
        def call():
            skips.apply(["k"])
            connections.close_all()

        with held_elsewhere("k"), assert_skipped(skips):
            in_another_thread(call)


class TestLocksOff:
    def test_a_held_lock_is_no_conflict(self, rival):
        with held_elsewhere("k"):
            with locks_off():
                assert skips.apply(["k"]).get() == "done"
            assert skips.apply(["k"]).get() == "skipped"

    def test_no_lock_session_is_opened_even_without_a_database(self):
        with locks_off(), advisory("k") as acquired:
            assert acquired
            assert without_body.apply().get() == "ran"

    def test_other_settings_stay_as_they_are(self, pglock_settings):
        pglock_settings(LEASE=7)
        with locks_off():
            assert settings.CELERY_PGLOCK == {"LEASE": 7, "ENABLED": False}
        assert settings.CELERY_PGLOCK == {"LEASE": 7}

    def test_it_decorates_functions(self):
        @locks_off()
        def is_enabled():
            return settings.CELERY_PGLOCK.get("ENABLED", True)

        assert not is_enabled()
        assert settings.CELERY_PGLOCK.get("ENABLED", True)

    @pytest.mark.django_db(databases=["default", "sqlite"])
    def test_a_task_in_a_transaction_needs_no_postgresql(self):
        with pytest.raises(LockMisuse, match="is not PostgreSQL"):
            on_sqlite.apply().get()
        with locks_off():
            assert on_sqlite.apply().get() == "done"


@kit.task(shared=False, base=AdvisoryTask)
def without_body():
    return "ran"


@locks_off()
@override_settings(CELERY_PGLOCK={"LEASE": 9})
class TestOfDjangos(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.before = settings.CELERY_PGLOCK

    def test_they_are_off_from_the_setting_up_of_its_data_and_other_settings_stay(self):
        assert self.before == settings.CELERY_PGLOCK == {"LEASE": 9, "ENABLED": False}

    @override_settings(CELERY_PGLOCK={})
    def test_one_test_may_have_them_on(self):
        with held_elsewhere("k"), assert_skipped(skips):
            skips.apply(["k"])


@locks_off()
class TestOfUnittests(unittest.TestCase):
    def test_they_are_off(self):
        assert settings.CELERY_PGLOCK["ENABLED"] is False


class TestInATestCase(TestCase):
    def test_a_transaction_level_lock_stays_until_the_test_ends(self):
        with assert_ran(in_transaction):
            in_transaction.apply(["k"])
        assert not lock_free(in_transaction.lock_for("k"))
        with assert_ran(in_transaction):
            in_transaction.apply(["k"])

    def test_and_no_longer(self):
        assert lock_free(in_transaction.lock_for("k"))


class TestClosing:
    def test_what_was_left_is_told_and_free_at_once(self, rival):
        advisory("by hand").acquire()
        lock = ExclusiveLock("counted")
        lock.acquire()
        with pytest.warns(LocksLeftBehind, match="^this test left locks behind, .*: 'by hand', 'counted'$"):
            close_lock_sessions("this test")
        assert not rival.sees_advisory_locks()
        assert not lock.locked()
        with pytest.raises(LockNotHeld):
            advisory("by hand").release()

    def test_what_was_held_before_stays_without_what_came_since(self, rival):
        lock = ExclusiveLock("since")
        with advisory("before"), advisory("twice"):
            before = leftovers.in_use()
            lock.acquire()
            advisory("twice").acquire()
            left = leftovers.clear_away("this test", before)
            assert str(left) == "this test left locks behind, which are free again now: 'twice', 'since'"
            assert not lock.locked()
            assert rival.could_take("since")
            assert rival.sees_held("before")
            assert rival.sees_held("twice")
        assert not rival.sees_advisory_locks()

    def test_what_another_thread_left_is_free_and_lost_to_it(self, rival, monkeypatch):
        monkeypatch.setattr(leftovers, "PATIENCE", 0.1)
        is_held, may_end = threading.Event(), threading.Event()
        outcomes = []

        def hold():
            try:
                with advisory("k"):
                    is_held.set()
                    may_end.wait()
            except LockLost as lost:
                outcomes.append(lost.reason)

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        is_held.wait()
        with pytest.warns(LocksLeftBehind, match="^A test left locks behind, .*: 'k'$"):
            close_lock_sessions()
        assert rival.could_take("k")
        may_end.set()
        thread.join()
        assert outcomes == ["A test has ended"]

    def test_what_another_thread_waits_for_it_does_not_get(self, rival, monkeypatch):
        monkeypatch.setattr(leftovers, "PATIENCE", 0.1)
        rival.take("k")
        outcomes = []

        def wait():
            try:
                advisory("k", timeout=None).acquire()
            except DatabaseError as error:
                outcomes.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        wait_until(lambda: rival.sees_held("k", granted=False))
        with pytest.warns(LocksLeftBehind, match="left a thread behind that waited for a lock"):
            close_lock_sessions()
        thread.join()
        assert not rival.sees_held("k", granted=False)
        assert len(outcomes) == 1

    def test_a_thread_that_is_about_to_end_is_waited_for(self, rival):
        is_held = threading.Event()

        def hold():
            with advisory("k"):
                is_held.set()
                time.sleep(0.2)

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        is_held.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close_lock_sessions()
        thread.join()

    def test_idle_sessions_are_closed(self, pooled, rival):
        with advisory("k"):
            pass
        assert rival.ask(LOCK_SESSIONS)
        close_lock_sessions()
        # By itself it would be closed after 10 s.
        wait_until(lambda: not rival.ask(LOCK_SESSIONS), seconds=5)

    def test_with_nothing_left_nothing_is_connected_to(self):
        close_lock_sessions()
        assert not pool().in_use()


def test_asking_leaves_no_connection_of_djangos_in_a_thread(rival):
    def ask():
        return lock_free("k"), connections["default"].connection

    assert in_another_thread(ask) == (True, None)
