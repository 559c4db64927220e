"""What django-pglock, postgresql.alock and django-pglocks describe in their documents, by their examples."""

import datetime as dt
import threading
import time
from contextlib import contextmanager

import psycopg
import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import OperationalError, connection, connections, transaction
from django.db.utils import OperationalError as DjangosOperationalError

import celery_pglock as alock
import celery_pglock as pglock
from celery_pglock.keys import key
from celery_pglock.models import BlockedPGLock, PGLock
from celery_pglock.pool import pool
from tests.conftest import LOCK_SESSIONS, Rival, wait_until
from tests.models import Entry

# Longer than any answer takes, shorter than the shortest wait in the examples.
AT_ONCE = 0.5


class Elsewhere:
    """A function that runs in another thread, and so on another session."""

    def __init__(self, function):
        self.result = None
        self.error = None
        self._function = function
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.result = self._function()
        except Exception as error:
            self.error = error
        finally:
            connections.close_all()

    def is_over(self):
        return not self._thread.is_alive()

    def join(self):
        self._thread.join()
        if self.error:
            raise self.error
        return self.result


def waits_for(rival, identifier, number=1):
    return wait_until(lambda: rival.sees_held(identifier, granted=False) == number)


@contextmanager
def taken(rival, identifier, *, shared=False):
    rival.take(identifier, shared=shared)
    try:
        yield
    finally:
        rival.give_back(identifier, shared=shared)


class TestAdvisoryLocks:
    """django-pglock: Advisory Locks; Quickstart."""

    def test_once_acquired_all_other_code_requesting_the_lock_will_wait_until_it_is_released(self, rival):
        order = []

        def other_code():
            with pglock.advisory("my_lock_id"):
                order.append("other code")

        with pglock.advisory("my_lock_id"):
            others = [Elsewhere(other_code) for _ in range(2)]
            waits_for(rival, "my_lock_id", 2)
            order.append("released")
        for other in others:
            other.join()
        assert order == ["released", "other code", "other code"]

    def test_theres_only_one_instance_of_my_exclusive_function_running_at_a_time(self, rival):
        running, most, go = [], [], threading.Event()

        @pglock.advisory("my_module.my_exclusive_function")
        def my_exclusive_function():
            # All other calls of my_exclusive_function will wait for this one to finish
            running.append(1)
            most.append(len(running))
            go.wait(10)
            running.pop()

        calls = [Elsewhere(my_exclusive_function) for _ in range(3)]
        waits_for(rival, "my_module.my_exclusive_function", 2)
        go.set()
        for call in calls:
            call.join()
        assert most == [1, 1, 1]

    def test_as_a_decorator_the_lock_id_defaults_to_module_name_dot_function_name(self, rival):
        @pglock.advisory()
        def my_exclusive_function():
            return rival.could_take("tests.test_seeds.my_exclusive_function")

        assert my_exclusive_function() is False
        assert rival.could_take("tests.test_seeds.my_exclusive_function")

    def test_the_lock_id_is_a_global_name_across_the_entire_database(self, rival):
        parameters = connection.get_connection_params()
        parameters |= {"cursor_factory": None, "context": None, "dbname": "template1", "autocommit": True}
        with pglock.advisory("my_lock_id", using="locks"):
            assert Elsewhere(pglock.advisory("my_lock_id", timeout=0).acquire).join() is False
            with psycopg.connect(**parameters) as in_another_database:
                answer = in_another_database.execute(
                    "SELECT pg_try_advisory_lock(%s)", key("my_lock_id").arguments
                )
                assert answer.fetchone() == (True,)

    def test_session_based_locks_are_used_by_default(self, rival):
        with transaction.atomic(), pglock.advisory("my_lock_id"):
            transaction.set_rollback(True)
        with pglock.advisory("my_lock_id"):
            with transaction.atomic():
                assert not rival.could_take("my_lock_id")
            assert not rival.could_take("my_lock_id")

    def test_theyre_manually_released_when_the_context_manager_exits(self, rival):
        with pytest.raises(KeyError), pglock.advisory("my_lock_id"):
            assert not rival.could_take("my_lock_id")
            raise KeyError
        assert rival.could_take("my_lock_id")

    def test_theyre_released_when_the_database_connection_is_terminated(self, rival):
        with pytest.raises(pglock.LockLost), pglock.advisory("my_lock_id"):
            assert rival.ask("SELECT pg_terminate_backend(%s, 5000)", pool().leased["default"].backend_pid)
            assert rival.could_take("my_lock_id")

    def test_the_readme_code_blocks_until_the_my_lock_id_lock_is_available(self, rival):
        def code():
            with pglock.advisory("my_lock_id"):
                # This code blocks until the "my_lock_id" lock is available
                return rival.sees_held("my_lock_id")

        with taken(rival, "my_lock_id"):
            blocked = Elsewhere(code)
            waits_for(rival, "my_lock_id")
        assert blocked.join() == 1


class TestConfiguringLockWaitTime:
    """django-pglock: Configuring Lock Wait Time."""

    @pytest.mark.parametrize("arguments", [{}, {"timeout": None}])
    def test_by_default_and_with_none_it_waits_without_a_limit(self, rival, arguments):
        lock = pglock.advisory("my_lock_id", **arguments)
        with taken(rival, "my_lock_id"):
            waiting = Elsewhere(lambda: lock.acquire() and (lock.release() or True))
            waits_for(rival, "my_lock_id")
            query = rival.ask(
                "SELECT query FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            assert "pg_advisory_lock" in query
            # Nothing bounds it: neither the statement nor, where that says nothing, the server's setting.
            assert ("set_config('lock_timeout', '0'" in query) is ("timeout" in arguments)
            assert query.count("lock_timeout") == len(arguments)
            assert rival.ask("SHOW lock_timeout") == "0"
        assert waiting.join() is True

    @pytest.mark.parametrize("is_taken", [False, True])
    def test_timeout_0_avoids_waiting_and_the_flag_tells(self, rival, is_taken):
        done = []
        if is_taken:
            rival.take("my_lock_id")
        started = time.monotonic()
        with pglock.advisory("my_lock_id", timeout=0) as acquired:
            if not acquired:
                # Do stuff if the lock cannot be acquired
                done.append("not acquired")
            else:
                # The lock was acquired
                done.append("acquired")
        assert time.monotonic() - started < AT_ONCE
        assert done == ["not acquired" if is_taken else "acquired"]

    def test_here_we_wait_up_to_two_seconds_to_acquire_the_lock(self, rival):
        rival.take("my_lock_id")
        started = time.monotonic()
        with pglock.advisory("my_lock_id", timeout=2) as acquired:
            assert acquired is False
        assert 2 <= time.monotonic() - started < 2 + AT_ONCE

    def test_a_lock_that_comes_free_within_the_two_seconds_is_acquired(self, rival):
        def code():
            with pglock.advisory("my_lock_id", timeout=2) as acquired:
                return acquired

        with taken(rival, "my_lock_id"):
            waiting = Elsewhere(code)
            waits_for(rival, "my_lock_id")
        assert waiting.join() is True

    def test_use_a_timedelta_for_better_precision(self, rival):
        rival.take("my_lock_id")
        started = time.monotonic()
        with pglock.advisory("my_lock_id", timeout=dt.timedelta(milliseconds=120)) as acquired:
            assert acquired is False
        assert 0.12 <= time.monotonic() - started < 0.12 + AT_ONCE


class TestSideEffects:
    """django-pglock: Side Effects."""

    def test_the_example_without_an_id_needs_one_outside_of_a_decorator(self, rival):
        with (
            pytest.raises(ValueError, match="at least one lock id"),
            pglock.advisory(timeout=0, side_effect=pglock.Raise),
        ):
            pytest.fail("it must not run")

    def test_raise_throws_a_djangos_operational_error_if_the_lock_cannot_be_acquired(self, rival):
        rival.take("my_lock_id")
        with (
            pytest.raises(DjangosOperationalError),
            pglock.advisory("my_lock_id", timeout=0, side_effect=pglock.Raise),
        ):
            # A django.db.utils.OperationalError will be thrown if the lock
            # cannot be acquired.
            pytest.fail("it must not run")

    def test_when_using_the_decorator_the_side_effect_defaults_to_raise(self, rival):
        @pglock.advisory("my_lock_id", timeout=0)
        def decorated():
            pytest.fail("it must not run")

        rival.take("my_lock_id")
        with pytest.raises(OperationalError):
            decorated()

    def test_the_return_value_is_not_available_to_the_decorated_function(self):
        with pytest.raises(ValueError, match="Return is for"):
            pglock.advisory("my_lock_id", timeout=0, side_effect=pglock.Return)(lambda: None)

    def test_skip_skips_the_function_entirely_if_it_runs_anywhere_else(self, rival):
        runs = []

        @pglock.advisory(timeout=0, side_effect=pglock.Skip)
        def one_function_at_a_time():
            # This function runs once at a time. If this function runs anywhere
            # else, it will be skipped.
            runs.append(1)
            return Elsewhere(one_function_at_a_time).join()

        assert one_function_at_a_time() is None
        assert runs == [1]
        with taken(rival, "tests.test_seeds.one_function_at_a_time"):
            assert one_function_at_a_time() is None
        assert runs == [1]

    def test_the_readmes_non_overlapping_func_will_not_run_if_another_one_is_running(self, rival):
        runs = []

        @pglock.advisory(timeout=0, side_effect=pglock.Skip)
        def non_overlapping_func():
            # This function will not run if there's another one already running.
            # The decorator lock ID defaults to <module_name>.<function_name>
            runs.append(1)

        with taken(rival, "tests.test_seeds.non_overlapping_func"):
            non_overlapping_func()
        assert runs == []
        non_overlapping_func()
        assert runs == [1]

    def test_skip_only_applies_to_usage_of_the_decorator(self, rival):
        with (
            pytest.raises(ValueError, match="Skip is for the decorator"),
            pglock.advisory("my_lock_id", timeout=0, side_effect=pglock.Skip),
        ):
            pytest.fail("it must not run")


class TestSharedLocks:
    """django-pglock: Shared Locks."""

    def test_shared_locks_do_not_conflict_with_other_shared_locks(self, rival):
        rival.take("my_lock_id", shared=True)
        with pglock.advisory("my_lock_id", shared=True, timeout=0) as acquired:
            assert acquired

    def test_they_only_conflict_with_exclusive_locks_of_the_same_lock_id(self, rival):
        rival.take("my_lock_id")
        rival.take("other_lock_id", shared=True)
        with pglock.advisory("my_lock_id", shared=True, timeout=0) as acquired:
            assert not acquired
        with pglock.advisory("other_lock_id", timeout=0) as acquired:
            assert not acquired
        with pglock.advisory("third_lock_id", shared=True, timeout=0) as acquired:
            assert acquired
            assert not rival.could_take("third_lock_id")


class TestTransactionLevelLocks:
    """django-pglock: Transaction-Level Locks."""

    def test_it_is_released_at_the_end_of_a_transaction(self, rival):
        with transaction.atomic():
            acquired = pglock.advisory("lock_id", xact=True).acquire()
            assert acquired is True
            assert not rival.could_take("lock_id")

        # The lock is released at the end of the transaction.
        assert rival.could_take("lock_id")

    def test_a_rollback_is_an_end_too(self, rival):
        with pytest.raises(KeyError), transaction.atomic():
            assert pglock.advisory("lock_id", xact=True).acquire()
            raise KeyError
        assert rival.could_take("lock_id")

    def test_when_using_the_context_manager_a_transaction_will_be_opened(self, rival):
        assert not connection.in_atomic_block
        with pglock.advisory("lock_id", xact=True) as acquired:
            assert acquired
            assert connection.in_atomic_block
            assert not rival.could_take("lock_id")
        assert not connection.in_atomic_block
        assert rival.could_take("lock_id")

    def test_when_using_the_decorator_a_transaction_will_be_opened(self, rival):
        @pglock.advisory("lock_id", xact=True)
        def decorated():
            return connection.in_atomic_block and not rival.could_take("lock_id")

        assert decorated() is True
        assert rival.could_take("lock_id")

    def test_a_runtime_error_will_be_raised_if_a_transaction_is_already_open(self, rival):
        decorated = pglock.advisory("lock_id", xact=True)(lambda: pytest.fail("it must not run"))
        with transaction.atomic():
            with pytest.raises(RuntimeError), pglock.advisory("lock_id", xact=True):
                pytest.fail("it must not run")
            with pytest.raises(RuntimeError):
                decorated()

    def test_once_acquired_it_cannot_be_manually_released(self, rival):
        with transaction.atomic():
            lock = pglock.advisory("lock_id", xact=True)
            lock.acquire()
            with pytest.raises(RuntimeError):
                lock.release()
            assert not rival.could_take("lock_id")

    def test_the_functional_interface_needs_a_transaction(self, rival):
        with pytest.raises(RuntimeError):
            pglock.advisory("lock_id", xact=True).acquire()


def reads(table):
    """Whether somebody else can read the table without waiting."""
    reader = Rival()
    try:
        reader.connection.execute("SET lock_timeout = '50ms'")
        reader.connection.execute(f"SELECT FROM {table}")
    except psycopg.errors.LockNotAvailable:
        return False
    else:
        return True
    finally:
        reader.connection.close()


class TestModelLocks:
    """django-pglock: Model Locks."""

    @pytest.mark.django_db(transaction=True, available_apps=settings.INSTALLED_APPS)
    def test_any_operations_on_auth_user_will_be_exclusive_even_read_access_is_blocked(self):
        with transaction.atomic():
            pglock.model("auth.User")

            # Any operations on auth.User will be exclusive here. Even read access
            # for other transactions is blocked
            assert not reads("auth_user")
            assert User.objects.count() == 0
        assert reads("auth_user")

    def test_it_accepts_the_lock_mode_as_an_argument(self, rival):
        with transaction.atomic():
            assert pglock.model("tests.Entry", mode=pglock.SHARE)
            assert reads("tests_entry")
            assert [lock.mode for lock in PGLock.objects.on(Entry).filter(rel_kind="TABLE")] == ["SHARE"]

    def test_it_is_taken_during_a_transaction(self, rival):
        with pytest.raises(RuntimeError):
            pglock.model("tests.Entry")

    def test_use_the_timeout_argument_to_avoid_waiting_and_the_side_effect_to_adjust(self, rival):
        rival.connection.execute("BEGIN; LOCK TABLE tests_entry")
        started = time.monotonic()
        with transaction.atomic():
            assert pglock.model("tests.Entry", timeout=0) is False
            with pytest.raises(DjangosOperationalError):
                pglock.model("tests.Entry", timeout=0.05, side_effect=pglock.Raise)
            with pytest.raises(ValueError, match="cannot be done here"):
                pglock.model("tests.Entry", timeout=0, side_effect=pglock.Skip)
        assert time.monotonic() - started < 2 * AT_ONCE


class TestPrioritizingBlockedCode:
    """django-pglock: Prioritizing Blocked Code."""

    def test_other_statements_that_have_conflicting_locks_will_be_killed_on_a_periodic_interval(self, rival):
        Entry.objects.create(key="row", task_id="", what="begins")
        rival.connection.execute("BEGIN; SELECT FROM tests_entry FOR UPDATE")

        @pglock.prioritize()
        def my_func():
            # Any other statements that have conflicting locks will be killed on a
            # periodic interval.
            return Entry.objects.update(what="ends")

        started = time.monotonic()
        assert my_func() == 1
        assert time.monotonic() - started >= 1
        with pytest.raises(psycopg.OperationalError):
            rival.connection.execute("SELECT 1")

    def test_it_terminates_any_locks_blocking_the_wrapped_code(self, rival):
        rival.connection.execute("BEGIN; LOCK TABLE tests_entry")
        with pglock.prioritize(interval=0.1):
            assert Entry.objects.count() == 0


class TestSettingTheLockTimeout:
    """django-pglock: Setting the Lock Timeout."""

    def test_the_function_will_throw_if_any_code_takes_longer_than_one_second_to_acquire_a_lock(self, rival):
        rival.connection.execute("BEGIN; LOCK TABLE tests_entry")

        @pglock.timeout(1)
        def do_stuff():
            # This function will throw an exception if any code takes longer than
            # one second to acquire a lock
            return Entry.objects.count()

        started = time.monotonic()
        with pytest.raises(DjangosOperationalError):
            do_stuff()
        assert 1 <= time.monotonic() - started < 1 + AT_ONCE

    def test_it_dynamically_sets_postgres_lock_timeout(self, rival):
        def in_force():
            with connection.cursor() as cursor:
                cursor.execute("SHOW lock_timeout")
                return cursor.fetchone()[0]

        before = in_force()
        with pglock.timeout(1):
            assert in_force() == "1s"
            with pglock.timeout(seconds=1, milliseconds=100):
                assert in_force() == "1100ms"
            assert in_force() == "1s"
        assert in_force() == before

    def test_it_is_what_advisory_takes_if_its_timeout_is_left_unset(self, rival):
        rival.take("my_lock_id")
        started = time.monotonic()
        with pglock.timeout(0.2), pglock.advisory("my_lock_id") as acquired:
            assert not acquired
        assert 0.2 <= time.monotonic() - started < 0.2 + AT_ONCE


class TestQueryingLocks:
    """django-pglock: Querying Locks."""

    def test_use_pglock_to_query_active_locks(self, rival):
        rival.connection.execute("BEGIN; LOCK TABLE tests_entry IN SHARE MODE")
        lock = PGLock.objects.on("tests.Entry").select_related("activity").get(rel_kind="TABLE")
        assert (lock.type, lock.mode, lock.granted, lock.rel_name) == (
            "RELATION",
            "SHARE",
            True,
            "tests_entry",
        )
        assert lock.activity.pk == rival.ask("SELECT pg_backend_pid()")
        assert lock.activity.state == "IDLE_IN_TRANSACTION"

    def test_an_advisory_lock_is_an_active_lock_too(self, rival):
        with pglock.advisory("my_lock_id"):
            assert PGLock.objects.get(type="ADVISORY").name == "my_lock_id"

    def test_use_blocked_pglock_to_query_locks_and_join_the_activity_thats_blocking_them(self, rival):
        pid = rival.ask("SELECT pg_backend_pid()")
        rival.connection.execute("BEGIN; LOCK TABLE tests_entry")
        rival.take("my_lock_id")
        blocked = [
            Elsewhere(Entry.objects.count),
            Elsewhere(pglock.advisory("my_lock_id", timeout=5).acquire),
        ]
        waits = BlockedPGLock.objects.select_related("activity", "blocking_activity").order_by("type")
        wait_until(lambda: waits.count() == 2)
        advisory, relation = waits
        assert (advisory.type, advisory.name) == ("ADVISORY", "my_lock_id")
        assert (relation.type, relation.rel_name) == ("RELATION", "tests_entry")
        for wait in (advisory, relation):
            assert not wait.granted
            assert wait.blocking_activity.pk == pid
            assert wait.activity.pk != pid
        assert [stop.pid for stop in waits.terminate_blocking_activity()] == [pid]
        assert [call.join() for call in blocked] == [0, True]
        # The thread has ended, and its session ends with what is left over.
        wait_until(lambda: rival_sees_nothing("my_lock_id"))


def rival_sees_nothing(identifier):
    somebody = Rival()
    try:
        return somebody.sees_held(identifier) == 0
    finally:
        somebody.connection.close()


class TestAcquiringALocks:
    """postgresql.alock: Acquiring ALocks. The argument db is the alias ``using``."""

    def test_a_single_alock_can_acquire_and_release_multiple_advisory_locks(self, rival):
        table1_oid = 192842
        table2_oid = 192849
        l = alock.ExclusiveLock((table1_oid, 0), (table2_oid, 0), using="default")  # noqa: E741 - theirs
        l.acquire()
        assert rival.sees_held((table1_oid, 0)) == rival.sees_held((table2_oid, 0)) == 1
        l.release()
        assert rival.sees_advisory_locks() == 0

    def test_it_must_be_released_the_number_of_times_it_has_been_acquired(self, rival):
        lock = alock.ExclusiveLock(1)
        for _ in range(3):
            lock.acquire()
        for _ in range(3):
            assert not rival.could_take(1)
            lock.release()
        assert rival.could_take(1)

    def test_acquiring_an_alock_again_will_merely_increment_its_count(self, rival):
        lock = alock.ExclusiveLock(1)
        with lock:
            rival.connection.execute("SET lock_timeout = '50ms'")
            assert lock.acquire(blocking=False) is True
            assert rival.sees_held(1) == 1
            lock.release()
            assert not rival.could_take(1)

    def test_alocks_are_associated_with_and_survived_by_their_session(self, rival, pooled):
        lock = alock.ExclusiveLock(1)
        with lock:
            session = pool().leased["default"]
            assert lock.locked()
        assert rival.sees_advisory_locks() == 0
        assert rival.ask(LOCK_SESSIONS) == 1
        with lock:
            assert pool().leased["default"] is session

    def test_both_types_of_identifiers_may_be_used_within_the_same_alock(self, rival):
        ids = [(0, 0), 0, 1]
        with alock.ShareLock(*ids, using="default"):
            assert [rival.sees_held(identifier) for identifier in ids] == [1, 1, 1]

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_00_is_acquired_first_then_0_and_lastly_1(self, rival, position):
        ids = [(0, 0), 0, 1]
        lock = alock.ExclusiveLock(*ids)
        with taken(rival, ids[position]):
            waiting = Elsewhere(lambda: lock.acquire() and lock.release())
            waits_for(rival, ids[position])
            assert [rival.sees_held(identifier) for identifier in ids] == [1] * (position + 1) + [0] * (
                2 - position
            )
        waiting.join()


class TestALocks:
    """postgresql.alock: ALocks, ALock Interface Points."""

    def test_exclusive_locks_will_conflict_with_other_exclusive_locks_and_share_locks(self, rival):
        with alock.ExclusiveLock(1):
            assert not rival.could_take(1)
            assert not rival.could_take(1, shared=True)
            assert Elsewhere(lambda: alock.ShareLock(1).acquire(blocking=False)).join() is False

    def test_share_locks_can_be_acquired_when_another_backend_has_a_share_lock(self, rival):
        with taken(rival, 1, shared=True), alock.ShareLock(1) as lock:
            assert lock.locked()

    def test_an_exclusive_lock_with_the_same_identifier_will_conflict(self, rival):
        with alock.ShareLock(1):
            assert not rival.could_take(1)
        with taken(rival, 1):
            assert not alock.ShareLock(1).acquire(blocking=False)

    @pytest.mark.parametrize("arguments", [(), (True,)])
    def test_if_blocking_is_true_it_will_block_until_all_have_been_acquired(self, rival, arguments):
        lock = alock.ExclusiveLock(1, 2)

        def code():
            assert lock.acquire(*arguments)
            held = rival.sees_held(1) + rival.sees_held(2)
            lock.release()
            return held

        with taken(rival, 2):
            blocked = Elsewhere(code)
            waits_for(rival, 2)
        assert blocked.join() == 2

    def test_if_blocking_is_false_success_is_indicated_by_the_returned_object(self, rival):
        lock = alock.ExclusiveLock(1, 2)
        with taken(rival, 2):
            assert lock.acquire(blocking=False) is False
            assert rival.could_take(1)
        assert lock.acquire(blocking=False) is True
        lock.release()

    def test_if_the_lock_has_not_been_acquired_release_raises_a_runtime_error(self, rival):
        with pytest.raises(RuntimeError):
            alock.ShareLock(1).release()

    def test_locked_is_a_boolean_describing_whether_the_locks_are_held(self, rival):
        lock = alock.ShareLock(1)
        assert lock.locked() is False
        with lock:
            assert lock.locked() is True
        assert lock.locked() is False

    def test_locked_is_false_if_the_lock_connection_has_been_closed(self, rival):
        with alock.ShareLock(1) as lock:
            pool().leased["default"].close()
            assert lock.locked() is False

    def test_enter_is_always_blocking_and_exit_releases(self, rival):
        def code():
            with alock.ExclusiveLock(1) as lock:
                return lock.locked()

        with taken(rival, 1):
            blocked = Elsewhere(code)
            waits_for(rival, 1)
        assert blocked.join() is True
        assert rival.could_take(1)


class TestBulkImports:
    """Xof: PostgreSQL Advisory Locks in Django Made Easy."""

    def test_any_number_of_bulk_importers_can_run_at_the_same_time(self, rival):
        together = threading.Barrier(3, timeout=10)

        def bulk_import():
            with pglock.advisory("bulk", shared=True):
                together.wait()

        for importer in [Elsewhere(bulk_import) for _ in range(3)]:
            importer.join()

    def test_the_analysis_waits_until_all_importers_are_done_and_holds_off_new_ones(self, rival):
        happened = []
        done = [threading.Event(), threading.Event()]
        finish_analysis = threading.Event()

        def bulk_import(number):
            with pglock.advisory("bulk", shared=True):
                done[number].wait(10)
                happened.append(f"import {number}")

        def analysis():
            with pglock.advisory("bulk"):
                finish_analysis.wait(10)
                happened.append("analysis")

        def late_import():
            with pglock.advisory("bulk", shared=True):
                happened.append("late import")

        importers = [Elsewhere(lambda number=number: bulk_import(number)) for number in range(2)]
        wait_until(lambda: rival.sees_held("bulk") == 2)
        analyst = Elsewhere(analysis)
        waits_for(rival, "bulk")
        done[0].set()
        importers[0].join()
        assert rival.sees_held("bulk", granted=False) == 1
        done[1].set()
        importers[1].join()
        wait_until(lambda: rival.sees_held("bulk") == 1 and not rival.sees_held("bulk", granted=False))
        late = Elsewhere(late_import)
        waits_for(rival, "bulk")
        finish_analysis.set()
        analyst.join()
        late.join()
        assert happened == ["import 0", "import 1", "analysis", "late import"]

    def test_postgresql_cleans_them_up_when_a_session_terminates(self, rival):
        lock = alock.ExclusiveLock("bulk")
        lock.acquire()
        pool().leased["default"].close()
        wait_until(lambda: rival.could_take("bulk"))
        lock.release()

    def test_advisory_locks_can_span_multiple_transactions(self, rival):
        with pglock.advisory("bulk"):
            for _ in range(2):
                with transaction.atomic():
                    Entry.objects.create(key="bulk", task_id="", what="begins")
                assert not rival.could_take("bulk")
        assert rival.could_take("bulk")

    def test_clean_up_on_exit_is_automatic(self, rival):
        with pytest.raises(KeyError), pglock.advisory("bulk", shared=True):
            raise KeyError
        assert rival.sees_advisory_locks() == 0
