"""A lock is lost while the body runs: who learns of it, how fast, and what becomes of the task."""

import os
import signal
import statistics
import time

import pytest
from celery import states

from celery_pglock import LockLost
from celery_pglock.models import LossCount
from tests.conftest import ADVISORY_HERE, running_worker, wait_until
from tests.losing_tasks import (
    asks_for_another_run_and_fails,
    fails_at_its_end,
    fails_by_itself,
    is_interrupted,
    is_only_warned,
    nests,
    sleeps_without_a_lock,
    swallows_everything,
    tells_when_it_is_interrupted,
    tries_again,
)
from tests.models import Entry

BACKEND = f"SELECT pid FROM pg_locks WHERE {ADVISORY_HERE} AND granted AND pid <> pg_backend_pid()"

SESSION_OF = "SELECT pid FROM pg_stat_activity WHERE application_name = %s"

SLEEPING = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' AND state = 'active'"


pytestmark = pytest.mark.long


def begun(key, times=1):
    wait_until(lambda: Entry.objects.filter(key=key, what="begins").count() >= times, f"{key} begins")


def end_the_session(rival):
    """As an operator does, or the server's end; answers when, in seconds since the epoch."""
    pid = wait_until(lambda: rival.ask(BACKEND))
    ended_at = time.time()
    rival.ask("SELECT pg_terminate_backend(%s)", pid)
    return ended_at


def child(result):
    """The process that runs a task, as it told when it began."""
    return wait_until(lambda: result.state == states.STARTED and result.info)["pid"]


def kill(result):
    pid = child(result)
    killed_at = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return killed_at


@pytest.fixture(scope="module")
def _children(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), running_worker("losing", concurrency=2, TASKS="losing_tasks") as worker:
        yield worker


@pytest.fixture
def send(_children, rival):
    """Sends a task to a prefork worker."""

    def send(task, *args):
        return task.apply_async(args, queue=_children.queue)

    send.worker = _children
    return send


class TestInPrefork:
    @pytest.mark.parametrize("way", ["sleep", "ask_postgresql", "compute"])
    def test_the_body_is_interrupted_within_200_ms(self, send, rival, way):
        delays = []
        for number in range(17):
            key = f"{way} {number}"
            result = send(tells_when_it_is_interrupted, key, way)
            begun(key)
            ended_at = end_the_session(rival)
            interrupted_at, message = result.get(timeout=10)
            assert message == f"lock {key!r} was lost while it was needed: the server ended it"
            delays.append(interrupted_at - ended_at)
        assert statistics.median(delays) < 0.2

    def test_an_interrupted_task_fails_and_tells(self, send, rival):
        result = send(is_interrupted, "k")
        begun("k")
        end_the_session(rival)
        with pytest.raises(LockLost, match="'k'"):
            result.get(timeout=10)
        wait_until(lambda: LossCount.objects.filter(key="k", task_name=is_interrupted.name, count=1).exists())
        assert "lost lock 'k' before it gave it back: the server ended it" in send.worker.log

    def test_the_work_connection_of_an_interrupted_statement_is_closed(self, send, rival):
        result = send(is_interrupted, "k", "ask_postgresql")
        begun("k")
        end_the_session(rival)
        with pytest.raises(LockLost):
            result.get(timeout=10)
        wait_until(lambda: not rival.ask(SLEEPING), "the statement is cancelled", seconds=5)

    def test_the_next_task_of_the_same_child_is_never_interrupted(self, send, rival):
        # A loss at the very end of a body: the signal may still be on its way.
        in_time = 0
        for number in range(60):
            key = f"late {number}"
            result = send(is_interrupted, key, "sleep", 0.05 + number % 20 / 1000)
            begun(key)
            # Some bodies have ended by now, if the machine is busy.
            in_time += rival.ask(f"SELECT count(pg_terminate_backend(pid)) FROM ({BACKEND}) AS backends")
            after = [send(sleeps_without_a_lock, 0.05) for _ in range(2)]
            result.get(timeout=10, propagate=False)
            assert [one.get(timeout=10) for one in after] == ["done", "done"]
            if in_time == 20:
                return
        assert in_time > 10

    def test_an_interruption_comes_once(self, send, rival):
        result = send(swallows_everything, "k")
        begun("k")
        end_the_session(rival)
        assert result.get(timeout=10) == 1

    def test_a_task_may_be_retried_for_it(self, send, rival):
        result = send(tries_again, "k")
        begun("k")
        end_the_session(rival)
        assert result.get(timeout=10) == 1

    def test_the_bodys_own_error_is_not_hidden(self, send, rival):
        result = send(fails_by_itself, "k")
        begun("k")
        end_the_session(rival)
        with pytest.raises(ValueError, match="its own"):
            result.get(timeout=10)

    def test_fail_lets_the_body_end_and_fails_the_task(self, send, rival):
        result = send(fails_at_its_end, "k")
        begun("k")
        end_the_session(rival)
        with pytest.raises(LockLost):
            result.get(timeout=10)
        assert Entry.objects.filter(key="k", what="ends").exists()

    def test_what_a_failing_task_has_sent_about_itself_is_sent_all_the_same(self, send, rival):
        send(asks_for_another_run_and_fails, "k")
        begun("k")
        end_the_session(rival)
        begun("k", times=2)

    def test_warn_lets_the_task_succeed_and_tells(self, send, rival):
        result = send(is_only_warned, "k")
        begun("k")
        end_the_session(rival)
        wait_until(lambda: "The session that keeps 'k' is lost" in send.worker.log)
        assert not result.ready()
        assert result.get(timeout=10) == "done"
        wait_until(lambda: LossCount.objects.filter(key="k", task_name=is_only_warned.name, count=1).exists())


class TestInOtherPools:
    def test_solo_interrupts(self, rival):
        with running_worker("losing-solo", pool="solo", TASKS="losing_tasks"):
            result = tells_when_it_is_interrupted.apply_async(["k", "sleep"], queue="losing-solo")
            begun("k")
            # Tasks of the tests before may still hold locks of theirs.
            pid = wait_until(lambda: rival.ask(SESSION_OF, f"pglock:{result.id}"))
            ended_at = time.time()
            rival.ask("SELECT pg_terminate_backend(%s)", pid)
            assert result.get(timeout=10)[0] - ended_at < 5

    @pytest.mark.parametrize("pool", ["threads", "gevent"])
    def test_others_are_told_by_check_and_live_on(self, rival, pool):
        queue = f"losing-{pool}"
        with running_worker(queue, pool=pool, concurrency=4, TASKS="losing_tasks") as worker:
            unaware = tells_when_it_is_interrupted.apply_async(["unaware", "sleep", 1], queue=queue)
            asking = tells_when_it_is_interrupted.apply_async(["asking", "check"], queue=queue)
            begun("unaware")
            begun("asking")
            ended_at = time.time()
            rival.ask(f"SELECT count(pg_terminate_backend(pid)) FROM ({BACKEND}) AS backends")
            assert asking.get(timeout=10)[0] - ended_at < 5
            assert unaware.get(timeout=10) == "nobody told"
            assert worker.process.poll() is None
            again = is_only_warned.apply_async(["unaware", 0], queue=queue)
            assert again.get(timeout=10) == "done"


@pytest.fixture(scope="module")
def _leased_child(django_db_setup, django_db_blocker):
    settings = '{"LEASE": 1}'
    with (
        django_db_blocker.unblock(),
        running_worker("leased", concurrency=1, TASKS="losing_tasks", PGLOCK_SETTINGS=settings) as worker,
    ):
        yield worker


@pytest.fixture
def leased(_leased_child, rival):
    """A worker with one child and a lease of a second."""
    return _leased_child


class TestDeadChildren:
    """The lock dies with its session, and the session with its process."""

    def test_its_key_is_free_at_once(self, send, rival):
        delays = []
        for number in range(5):
            result = send(is_interrupted, f"dead {number}")
            begun(f"dead {number}")
            killed_at = kill(result)
            wait_until(lambda: rival.could_take(f"dead {number}"))  # noqa: B023
            delays.append(time.monotonic() - killed_at)
        assert statistics.median(delays) < 0.1

    def test_also_while_it_waits_for_another(self, send, rival):
        delays = []
        rival.take("inner")
        for number in range(3):
            result = send(nests, f"dead {number}", "inner")
            begun(f"dead {number}")
            wait_until(lambda: rival.sees_held("inner", granted=False))
            killed_at = kill(result)
            wait_until(lambda: rival.could_take(f"dead {number}"))  # noqa: B023
            delays.append(time.monotonic() - killed_at)
        assert statistics.median(delays) < 1


class TestLease:
    def test_a_paused_child_loses_its_lock_and_knows_when_it_wakes(self, leased, rival):
        result = tells_when_it_is_interrupted.apply_async(["k", "check"], queue=leased.queue)
        begun("k")
        pid = child(result)
        os.kill(pid, signal.SIGSTOP)
        paused_at = time.monotonic()
        wait_until(lambda: not rival.sees_held("k"), "the server frees the key", seconds=10)
        assert 0.6 <= time.monotonic() - paused_at <= 1.5
        os.kill(pid, signal.SIGCONT)
        assert "was lost" in result.get(timeout=10)[1]

    def test_a_lock_is_kept_for_many_leases(self, leased, rival):
        result = is_interrupted.apply_async(["k", "sleep", 3], queue=leased.queue)
        begun("k")
        assert result.get(timeout=10) == "done"
        assert not LossCount.objects.exists()
