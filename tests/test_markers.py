"""Critical tasks mark their backends, and those that were stopped for them come back."""

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from celery import states, uuid
from django.db import connection, connections

from celery_pglock import LockMisuse, LockNotAcquired, Preempted, preemptions
from celery_pglock.audits import acting, audit
from celery_pglock.clocks import now
from celery_pglock.conflicts import CONFLICTS
from celery_pglock.keys import key
from celery_pglock.labels import Owner
from celery_pglock.markers import CRITICAL, marker
from celery_pglock.models import PGLock
from celery_pglock.sessions import LockSession
from celery_pglock.voices import Refused
from celery_pglock.work_connections import mark_a_new_one, marked
from tests.conftest import Rival, in_another_thread, running_worker, wait_until
from tests.marked_tasks import (
    fails,
    fails_after_a_retry_of_its_own,
    fails_the_second_time,
    sleeps_the_first_time,
    tells_its_markers,
    tries_again_by_itself,
    waits,
    waits_in_a_transaction,
)
from tests.models import Entry

APPLICATION_NAME = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
IN_THE_WAY = "in the way of close_books [7]"


def pid():
    connection.ensure_connection()
    return connection.connection.info.backend_pid


def has_failed_transaction():
    connection.set_autocommit(False)
    with pytest.raises(Exception, match="division by zero"), connection.cursor() as cursor:
        cursor.execute("SELECT 1 / 0")


class TestWorkConnections:
    def test_one_that_is_open_has_the_marker_and_the_name_for_as_long_as_the_task_runs(self, rival):
        before = rival.ask(APPLICATION_NAME, pid())
        with marked("some-task", 7):
            assert rival.sees_held((CRITICAL, 7)) == 1
            assert rival.ask(APPLICATION_NAME, pid()) == "celery:some-task"
        assert rival.sees_held((CRITICAL, 7)) == 0
        assert rival.ask(APPLICATION_NAME, pid()) == before

    def test_one_that_is_opened_later_has_them_too(self, rival):
        with marked("some-task", 7):
            connection.close()
            assert rival.sees_held((CRITICAL, 7)) == 0
            assert rival.ask(APPLICATION_NAME, pid()) == "celery:some-task"
            assert rival.sees_held((CRITICAL, 7)) == 1

    def test_those_of_other_threads_have_none(self, rival):
        def open_and_look():
            connection.ensure_connection()
            try:
                return rival.sees_held((CRITICAL, 7))
            finally:
                connection.close()

        connection.close()
        with marked("some-task", 7):
            assert in_another_thread(open_and_look) == 0

    def test_a_task_that_is_not_critical_has_none_and_asks_nothing(self, rival):
        with marked("some-task", 0):
            assert rival.ask(APPLICATION_NAME, pid()) != "celery:some-task"
            assert rival.sees_advisory_locks() == 0

    def test_one_that_is_broken_is_opened_again(self, rival):
        rival.ask("SELECT pg_terminate_backend(%s, 5000)", pid())
        with marked("some-task", 7):
            assert rival.ask(APPLICATION_NAME, pid()) == "celery:some-task"

    def test_no_marker_outlives_a_transaction_that_has_failed(self, rival):
        with marked("some-task", 7):
            pid()
            has_failed_transaction()
        wait_until(lambda: rival.sees_held((CRITICAL, 7)) == 0)

    @pytest.mark.django_db(transaction=True, databases=["default", "locks"])
    def test_no_marker_outlives_an_end_that_is_interrupted(self, rival):
        def interrupt(*_):
            raise InterruptedError

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with pytest.raises(InterruptedError), marked("some-task", 7):
                pid()
                connections["locks"].ensure_connection()
                assert rival.sees_held((CRITICAL, 7)) == 2
                # Which is read to find the connection's own name.
                rival.connection.execute("BEGIN; LOCK TABLE pg_settings")
                signal.setitimer(signal.ITIMER_REAL, 0.5)
            wait_until(lambda: rival.sees_held((CRITICAL, 7)) == 1)
        finally:
            signal.signal(signal.SIGALRM, before)
            rival.connection.execute("ROLLBACK")
        wait_until(lambda: rival.sees_held((CRITICAL, 7)) == 0)

    def test_those_of_djangos_pool_are_left_alone(self, rival, monkeypatch):
        options = {**connection.settings_dict["OPTIONS"], "pool": True}
        pid()
        with monkeypatch.context() as patch:
            patch.setitem(connection.settings_dict, "OPTIONS", options)
            with marked("some-task", 7):
                assert rival.sees_advisory_locks() == 0

    @pytest.mark.django_db(transaction=True, databases=["default", "sqlite"])
    def test_other_databases_are_left_alone(self):
        with marked("some-task", 7):
            connections["sqlite"].ensure_connection()
            mark_a_new_one(connections["sqlite"])


class TestLockSessions:
    @pytest.fixture
    def critical(self, rival):
        session = LockSession("default", Owner("close_books", "some-task", priority=7))
        yield session
        session.close()

    @pytest.mark.parametrize("strict", [False, True])
    def test_it_has_the_marker_until_it_is_laid_by(self, critical, rival, strict):
        lock = key("books")
        critical.take([lock], shared=False, timeout=0, strict=strict)
        assert rival.sees_held((CRITICAL, 7)) == 1
        critical.give_back([lock], shared=False)
        critical.lay_by()
        assert rival.sees_held((CRITICAL, 7)) == 0
        critical.take_up(Owner("other", "other-task"))
        critical.take([lock], shared=False, timeout=0)
        assert rival.sees_held((CRITICAL, 7)) == 0

    def test_it_has_the_marker_while_it_waits(self, critical, rival):
        lock = key("books")
        rival.take(lock)
        somebody = Rival()

        def look_and_free():
            wait_until(lambda: somebody.sees_held(lock, granted=False))
            seen = somebody.sees_held((CRITICAL, 7))
            rival.give_back(lock)
            return seen

        with ThreadPoolExecutor() as others, closing(somebody.connection):
            seen = others.submit(look_and_free)
            critical.take([lock], shared=False, timeout=20)
            assert seen.result() == 1

    @pytest.mark.parametrize("timeout", [0, 0.1])
    def test_it_has_none_after_it_was_refused(self, critical, rival, timeout):
        rival.take("books")
        try:
            assert critical.take([key("books")], shared=False, timeout=timeout) is None
        except Refused:
            assert timeout
        critical.lay_by()
        assert rival.sees_held((CRITICAL, 7)) == 0

    def test_one_that_ended_meanwhile_is_laid_by_without_a_word(self, critical, rival):
        critical.take([key("books")], shared=False, timeout=0)
        rival.ask("SELECT pg_terminate_backend(%s, 5000)", critical.backend_pid)
        critical.give_back([key("books")], shared=False)
        critical.lay_by()
        assert not critical.take_up(Owner())

    def test_every_role_sees_it(self, critical, rival):
        critical.take([key("books")], shared=False, timeout=0)
        rival.connection.execute("SET ROLE pg_monitor")
        assert rival.sees_held((CRITICAL, 7)) == 1

    def test_priorities_are_apart(self):
        assert marker(1) != marker(2)
        assert marker(2**31 - 1).arguments == (CRITICAL, 2**31 - 1)


@pytest.fixture(scope="module")
def _children(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), running_worker("marked", concurrency=2, TASKS="marked_tasks") as worker:
        yield worker


@pytest.fixture
def children(_children, transactional_db):
    return _children


def send(task, **options):
    result = task.apply_async(queue="marked", **options)
    wait_until(lambda: Entry.objects.filter(task_id=result.id, what="begins").exists(), "it begins")
    return result


def stop(task_id, *, comes_back):
    """As prioritize_critical_tasks does it."""
    name = f"pglock:{task_id}"
    with connection.cursor() as cursor, audit("default") as entries:
        cursor.execute("SELECT pid, backend_start FROM pg_stat_activity WHERE application_name = %s", [name])
        backend, backend_start = cursor.fetchone()
        with acting("beat", "prioritize_critical_tasks"):
            number = entries.begin("terminate", backend, backend_start, task_id, comes_back, IN_THE_WAY)
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [backend])
        entries.end(number, "terminated")


@pytest.mark.usefixtures("children")
class TestTasks:
    def test_a_critical_task_marks_its_work_connection_and_its_lock_session(self, rival):
        result = tells_its_markers.apply_async(queue="marked")
        assert result.get(timeout=20) == [[f"celery:{result.id}", 7], [f"pglock:{result.id}", 7]]
        assert rival.sees_advisory_locks() == 0

    def test_who_was_stopped_for_another_comes_back_and_succeeds(self):
        result = send(sleeps_the_first_time)
        stop(result.id, comes_back=True)
        assert result.get(timeout=20) == "done"
        assert Entry.objects.filter(task_id=result.id, what="begins").count() == 2

    def test_why_it_comes_back_can_be_read_meanwhile(self, rival):
        result = send(sleeps_the_first_time)
        stop(result.id, comes_back=True)
        wait_until(lambda: rival.take(sleeps_the_first_time.name))
        wait_until(lambda: result.state == states.RETRY)
        assert isinstance(result.result, Preempted)
        assert IN_THE_WAY in str(result.result)
        # Whoever has the lock by now is waited for, though the task raises if it is taken.
        wait_until(lambda: isinstance(result.result, LockNotAcquired))
        assert result.state == states.RETRY
        rival.give_back(sleeps_the_first_time.name)
        assert result.get(timeout=20) == "done"

    def test_its_conflicts_are_counted_anew(self, rival):
        result = send(sleeps_the_first_time, headers={CONFLICTS: 9})
        stop(result.id, comes_back=True)
        wait_until(lambda: rival.take(sleeps_the_first_time.name))
        wait_until(lambda: isinstance(result.result, LockNotAcquired))
        rival.give_back(sleeps_the_first_time.name)
        assert result.get(timeout=10) == "done"

    def test_who_is_not_to_come_back_fails_and_says_why(self):
        result = send(sleeps_the_first_time)
        stop(result.id, comes_back=False)
        with pytest.raises(Preempted, match="close_books"):
            result.get(timeout=20)
        assert result.state == states.FAILURE

    def test_who_was_stopped_by_a_person_has_lost_its_lock(self):
        result = send(sleeps_the_first_time)
        stop(result.id, comes_back=None)
        with pytest.raises(Exception, match="was lost while it was needed"):
            result.get(timeout=20)

    def test_an_act_explains_one_run_and_not_the_next(self):
        result = send(fails_the_second_time)
        stop(result.id, comes_back=True)
        with pytest.raises(Exception, match="for a reason of its own"):
            result.get(timeout=20)
        assert Entry.objects.filter(task_id=result.id, what="begins").count() == 2

    def test_an_act_explains_no_run_after_a_retry_of_its_own(self):
        result = send(fails_after_a_retry_of_its_own)
        stop(result.id, comes_back=True)
        with pytest.raises(Exception, match="for a reason of its own"):
            result.get(timeout=20)
        assert Entry.objects.filter(task_id=result.id, what="begins").count() == 3

    def test_an_act_explains_no_later_message_with_the_same_id(self):
        task_id = uuid()
        with audit("default") as entries:
            entries.end(entries.begin("terminate", 1, None, task_id, False, IN_THE_WAY), "terminated")
        result = fails.apply_async(queue="marked", task_id=task_id)
        with pytest.raises(Exception, match="for a reason of its own"):
            result.get(timeout=20)

    def test_who_cannot_be_sent_back_waits_its_turn_in_place(self, rival, broker, children):
        result = send(fails_the_second_time)
        with broker.refuses_messages():
            stop(result.id, comes_back=True)
            wait_until(lambda: rival.take(fails_the_second_time.name))
            wait_until(lambda: children.log.count(f"[{result.id}] waits in place") > 2 or result.ready())
            rival.give_back(fails_the_second_time.name)
            with pytest.raises(Exception, match="for a reason of its own"):
                result.get(timeout=20)

    def test_who_tries_again_by_itself_is_not_skipped(self, rival):
        result = send(tries_again_by_itself)
        stop(result.id, comes_back=True)
        wait_until(lambda: rival.take(tries_again_by_itself.name))
        wait_until(lambda: isinstance(result.result, LockNotAcquired))
        rival.give_back(tries_again_by_itself.name)
        assert result.get(timeout=20) == "done"

    @pytest.mark.parametrize("task", [waits, waits_in_a_transaction])
    def test_who_only_waits_comes_back_too_and_says_why(self, rival, task):
        rival.take("waited for")
        result = task.apply_async(queue="marked")
        wait_until(lambda: rival.sees_held("waited for", granted=False))
        with audit("default") as entries, connection.cursor() as cursor:
            waiter = PGLock.objects.get(granted=False).activity_id
            number = entries.begin("cancel", waiter, None, result.id, True, IN_THE_WAY)
            cursor.execute("SELECT pg_cancel_backend(%s)", [waiter])
            entries.end(number, "cancelled")
        wait_until(lambda: isinstance(result.result, Preempted))
        rival.give_back("waited for")
        assert result.get(timeout=20) == "done"


class TestTheAudit:
    def test_nothing_is_found_where_there_is_no_table(self, rival):
        rival.connection.execute("ALTER TABLE celery_pglock_act RENAME TO elsewhere")
        try:
            assert preemptions.newest("some-task", ["default"], now() - 60) is None
        finally:
            rival.connection.execute("ALTER TABLE elsewhere RENAME TO celery_pglock_act")

    def test_who_was_spared_was_not_stopped(self, rival):
        with audit("default") as entries:
            number = entries.begin("terminate", 1, None, "some-task", True, IN_THE_WAY)
            assert preemptions.newest("some-task", ["default"], now() - 60).reason == IN_THE_WAY
            entries.end(number, "gone")
        assert preemptions.newest("some-task", ["default"], now() - 60) is None

    @pytest.mark.parametrize(
        ("error", "may_be"),
        [(LockMisuse("x"), False), (ValueError("x"), False), (Preempted("x"), False)],
    )
    def test_an_error_that_tells_of_no_database_is_no_stop(self, error, may_be):
        assert preemptions.may_be_of_a_stop(error) is may_be
