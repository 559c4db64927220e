"""However a task, a child or a worker ends, the key is free afterwards."""

import importlib.util
import os
import signal

import pytest
from celery import states
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from tests.celery_app import app
from tests.conftest import LOCK_SESSIONS, running_worker, wait_until
from tests.models import Entry, most_at_once
from tests.worker_tasks import (
    at_most_three,
    hard_limited,
    leaves,
    retries,
    retries_itself,
    skips,
    soft_limited,
    soft_limited_while_waiting,
    waits,
)

pytestmark = pytest.mark.long

POOLS = ["prefork", "threads", "solo", "gevent"]


def child_of(result):
    """The process that runs a task, as it told when it began."""
    return wait_until(lambda: result.state == states.STARTED and result.info)["pid"]


def begun(key):
    return wait_until(lambda: Entry.objects.filter(key=key, what="begins").exists(), f"{key} begins")


def free(rival, key):
    return wait_until(lambda: not rival.sees_held(key), f"{key} is free", seconds=5)


class TestInPrefork:
    """On the shared worker: only a task, or the child that runs it, ends."""

    def test_a_soft_time_limit(self, worker, rival):
        with pytest.raises(SoftTimeLimitExceeded):
            soft_limited.delay("k").get(timeout=20)
        assert free(rival, "k")
        assert skips.delay("k").get(timeout=10) == "done"

    def test_a_soft_time_limit_while_waiting_leaves_no_ghost(self, worker, rival):
        rival.take("k")
        with pytest.raises(SoftTimeLimitExceeded):
            soft_limited_while_waiting.delay("k").get(timeout=20)
        wait_until(lambda: not rival.sees_held("k", granted=False))
        assert not Entry.objects.filter(key="k").exists()
        rival.give_back("k")
        assert rival.could_take("k")
        assert skips.delay("k").get(timeout=10) == "done"

    def test_a_hard_time_limit(self, worker, rival):
        result = hard_limited.delay("k")
        assert begun("k")
        assert free(rival, "k")
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=20)
        assert not Entry.objects.filter(key="k", what="ends").exists()

    @pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
    def test_a_revoked_task_that_is_terminated(self, worker, rival, how):
        result = skips.delay("k", 30)
        assert begun("k")
        app.control.revoke(result.id, terminate=True, signal=how)
        assert free(rival, "k")

    def test_a_child_that_is_killed(self, worker, rival):
        result = skips.delay("k", 30)
        assert begun("k")
        os.kill(child_of(result), signal.SIGKILL)
        assert free(rival, "k")

    def test_a_child_that_is_killed_while_it_waits(self, worker, rival):
        rival.take("k")
        result = waits.delay("k")
        wait_until(lambda: rival.sees_held("k", granted=False))
        os.kill(child_of(result), signal.SIGKILL)
        wait_until(lambda: not rival.sees_held("k", granted=False), seconds=5)

    def test_a_body_that_exits(self, worker, rival):
        leaves.delay("k")
        assert begun("k")
        assert free(rival, "k")


@pytest.mark.parametrize("pool", POOLS)
class TestOfWorkers:
    def test_a_killed_worker(self, rival, pool):
        with running_worker(f"killed-{pool}", pool=pool) as worker:
            skips.apply_async(["k", 30], queue=worker.queue)
            assert begun("k")
            worker.process.kill()
            assert free(rival, "k")

    def test_a_warm_shutdown_lets_the_task_end(self, rival, pool):
        with running_worker(f"warm-{pool}", pool=pool) as worker:
            result = skips.apply_async(["k", 1], queue=worker.queue)
            assert begun("k")
            worker.process.terminate()
            assert rival.sees_held("k")
            assert result.get(timeout=20) == "done"
            assert free(rival, "k")
            assert worker.process.wait(20) == 0

    def test_a_cold_shutdown(self, rival, pool):
        # Threads cannot be stopped: there it lasts until the task's end.
        with running_worker(f"cold-{pool}", pool=pool) as worker:
            skips.apply_async(["k", 2 if pool == "threads" else 30], queue=worker.queue)
            assert begun("k")
            worker.process.send_signal(signal.SIGQUIT)
            assert free(rival, "k")
            worker.process.wait(20)


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_many_tasks_in_one_process_never_overlap(rival, pool):
    with running_worker(f"many-{pool}", pool=pool, concurrency=8) as worker:
        results = []
        for number in range(60):
            results.append(waits.apply_async([f"exclusive {number % 3}"], queue=worker.queue))
            results.append(retries.apply_async([f"exclusive {number % 3}", 0.01], queue=worker.queue))
            results.append(skips.apply_async([f"exclusive {number % 3}", 0.01], queue=worker.queue))
            results.append(at_most_three.apply_async(["limited", 0.01], queue=worker.queue))
        answers = [result.get(timeout=60) for result in results]
        assert len(answers) == 240
        assert max(most_at_once(f"exclusive {number}") for number in range(3)) == 1
        assert 1 <= most_at_once("limited") <= 3
        assert not rival.sees_advisory_locks()


def test_a_gevent_task_that_is_revoked(rival):
    with running_worker("revoked-gevent", pool="gevent") as worker:
        result = skips.apply_async(["k", 30], queue=worker.queue)
        assert begun("k")
        app.control.revoke(result.id, terminate=True)
        assert free(rival, "k")


def test_eventlet_is_refused_at_worker_start(rival):
    if not importlib.util.find_spec("eventlet"):
        pytest.skip("eventlet is not installed: pip install eventlet")
    with pytest.raises(AssertionError, match="does not work with the eventlet pool"):  # noqa: SIM117
        with running_worker("eventlet", pool="eventlet"):
            pass


def test_without_locks_a_tasks_own_retry_is_still_sent(rival):
    with running_worker("disabled", PGLOCK_SETTINGS='{"ENABLED": false}') as worker:
        rival.take("k")
        assert retries_itself.apply_async(["k"], queue=worker.queue).get(timeout=10) == "done"


def test_a_misspelt_setting_is_refused_at_worker_start(rival):
    with (
        pytest.raises(AssertionError, match="CELERY_PGLOCK has no key 'TIMOUT'"),
        running_worker("misspelt-setting", PGLOCK_SETTINGS='{"TIMOUT": 1}'),
    ):
        pass


def test_a_misspelt_option_is_refused_at_worker_start(rival):
    with (
        pytest.raises(AssertionError, match="there is no option 'lock_kei'"),
        running_worker("misspelt-option", MISSPELT_OPTION="1"),
    ):
        pass


def test_idle_children_keep_one_session_each_and_close_it(rival):
    # After half a lease, if that is sooner than 10 seconds.
    with running_worker("idle", concurrency=4, PGLOCK_SETTINGS='{"LEASE": 4}'):
        results = [skips.apply_async([f"key {number}", 0.05], queue="idle") for number in range(20)]
        for result in results:
            result.get(timeout=20)
        assert 1 <= rival.ask(LOCK_SESSIONS) <= 4
        wait_until(lambda: rival.ask(LOCK_SESSIONS) == 0, "idle sessions are closed", seconds=10)
