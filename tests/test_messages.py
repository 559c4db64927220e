"""No message is dropped: not by a redelivered copy, nor by a broker that refuses."""

import os
import signal

import pytest
from celery import states, uuid

from tests.conftest import running_worker, wait_until
from tests.models import Entry, most_at_once
from tests.worker_tasks import (
    acks_late,
    replaces_itself_with_what_nobody_could_send,
    retries,
    retries_itself,
    retries_with_what_no_message_holds,
    retries_with_wrong_arguments,
    skips,
    without_result,
)

pytestmark = pytest.mark.long


def count(key, what="begins"):
    return Entry.objects.filter(key=key, what=what).count()


class TestRedelivery:
    """The same message twice, as a broker delivers it when the first run outlasts its patience."""

    @pytest.fixture
    def copies(self, rival):
        # Messages come back after a quarter of this at most.
        with running_worker(f"copies-{uuid()}", concurrency=2, VISIBILITY_TIMEOUT="4") as worker:
            yield worker

    def send(self, task, worker, key, seconds):
        first = task.apply_async([key, seconds], queue=worker.queue)
        wait_until(lambda: count(key))
        # A copy that begins tells its own process, as Celery has it.
        self.child = (first.info or {}).get("pid")
        task.apply_async([key, seconds], queue=worker.queue, task_id=first.id)
        wait_until(lambda: f"[{first.id}] ignored" in worker.log)
        return first

    def test_a_copy_neither_overwrites_the_result_nor_runs_when_the_original_succeeded(self, copies):
        result = self.send(acks_late, copies, "k", 2)
        assert result.state == states.STARTED
        assert result.get(timeout=20) == "done"
        wait_until(lambda: copies.log.count(f"[{result.id}] received") >= 4)
        assert result.get(timeout=20) == "done"
        assert count("k") == 1
        assert acks_late.apply_async(["k"], queue=copies.queue).get(timeout=20) == "done"

    def test_a_copy_runs_when_the_original_died(self, copies, rival):
        self.send(acks_late, copies, "k", 2)
        os.kill(self.child, signal.SIGKILL)
        wait_until(lambda: count("k", "ends"))
        assert count("k") == 2
        assert not rival.sees_held("k")

    def test_without_a_result_backend_it_runs_again_after_the_original(self, copies):
        self.send(without_result, copies, "k", 1)
        wait_until(lambda: count("k", "ends") == 2)
        assert most_at_once("k") == 1


class TestABrokerThatRefuses:
    """Redis answers NOPERM to LPUSH, by which a message is sent; all else works."""

    def test_a_conflict_waits_in_place_until_the_lock_is_free(self, worker, rival, broker):
        rival.take("k")
        result = retries.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            wait_until(lambda: f"[{result.id}] waits in place for lock 'k'" in worker.log)
            rival.give_back("k")
            assert result.get(timeout=20) == 0
        assert count("k") == 1

    def test_a_conflict_waits_in_place_until_the_broker_takes_its_retry(self, worker, rival, broker):
        rival.take("k")
        result = retries.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            wait_until(lambda: worker.log.count(f"[{result.id}] waits in place for lock 'k'") >= 2)
        wait_until(lambda: result.state == states.RETRY)
        rival.give_back("k")
        assert result.get(timeout=20) == 0
        assert count("k") == 1

    def test_one_message_is_tried_at_most_twice_a_second(self, worker, rival, broker):
        rival.take("k")
        result = retries.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            wait_until(lambda: f"[{result.id}] waits in place" in worker.log)
            with pytest.raises(Exception, match="timed out"):
                result.get(timeout=3)
            assert worker.log.count(f"[{result.id}] waits in place") <= 7
        rival.give_back("k")
        assert result.get(timeout=20) == 0

    def test_a_tasks_own_retry_waits_without_the_lock(self, worker, rival, broker):
        result = retries_itself.apply_async(["k"], countdown=1)
        with broker.refuses_messages():
            wait_until(lambda: f"[{result.id}] waits in place until the broker" in worker.log)
            assert rival.could_take("k")
        assert result.get(timeout=20) == "done"
        assert count("k") == 2


@pytest.mark.parametrize("task", [retries_with_what_no_message_holds, retries_with_wrong_arguments])
def test_a_retry_that_nobody_could_send_is_celerys_own_rejection(worker, rival, task):
    result = task.delay("k")
    wait_until(lambda: result.state == states.FAILURE)
    assert f"[{result.id}] waits in place" not in worker.log
    assert not rival.sees_held("k")
    assert skips.delay("k").get(timeout=10) == "done"


def test_a_replacement_that_nobody_could_send_fails_the_task(worker, rival):
    with pytest.raises(TypeError, match="missing 1 required"):
        replaces_itself_with_what_nobody_could_send.delay("k").get(timeout=10)
    assert not rival.sees_held("k")
