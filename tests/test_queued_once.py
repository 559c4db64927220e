"""celery-once and celery-singleton: what they do as the page says, and what goes well with locks of ours."""

import pytest
import redis
from celery import states

from celery_pglock.testing import held_elsewhere
from tests.conftest import running_worker, wait_until
from tests.models import Entry, most_at_once

celery_once = pytest.importorskip("celery_once")
celery_singleton = pytest.importorskip("celery_singleton")

from tests import once_tasks as tasks  # noqa: E402 - not without them
from tests.celery_app import app  # noqa: E402

PATIENCE = 20

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def _worker(django_db_setup, django_db_blocker):
    app.control.purge()
    with django_db_blocker.unblock(), running_worker("celery", concurrency=4, TASKS="once_tasks") as worker:
        yield worker


@pytest.fixture
def keys():
    """The names of all their keys in Redis, each time it is asked."""
    with redis.from_url(app.conf.broker_url, decode_responses=True) as client:

        def found():
            return sorted(key for key in client.scan_iter() if key.startswith(("qo_", "SINGLETONLOCK_")))

        yield found
        for key in found():
            client.delete(key)


@pytest.fixture
def worker(_worker, rival, keys):
    return _worker


def begun(key):
    return Entry.objects.filter(key=key, what="begins").count()


class TestWithoutALock:
    def test_a_second_message_is_refused(self, worker, keys):
        with held_elsewhere('once.waits(key="k")'):
            waits = tasks.once_waits.delay("k")
            with pytest.raises(celery_once.AlreadyQueued):
                tasks.once_waits.delay("k")
        assert waits.get(timeout=PATIENCE) == "done"
        first = tasks.singleton_skips.apply_async(["k"], countdown=60)
        assert tasks.singleton_skips.delay("k").id == first.id
        first.revoke()

    @pytest.mark.parametrize("task", [tasks.once_without_a_lock, tasks.singleton_without_a_lock])
    def test_when_its_key_has_expired_a_second_run_begins_beside_the_first(self, worker, keys, task):
        first = task.delay("k", 3)
        wait_until(lambda: begun("k") == 1)
        wait_until(lambda: not keys())
        second = task.delay("k", 3)
        first.get(timeout=PATIENCE)
        second.get(timeout=PATIENCE)
        assert most_at_once("k") == 2

    def test_what_is_sent_by_name_sets_no_key_and_deletes_that_of_another(self, worker, keys):
        first = app.send_task("singleton.all_arguments", ["k", 0])
        # It deletes its key when its result is known already.
        wait_until(lambda: f"[{first.id}] succeeded" in worker.log)
        waits = tasks.singleton_all_arguments.apply_async(["k", 0], countdown=60)
        assert keys()
        app.send_task("singleton.all_arguments", ["k", 0]).get(timeout=PATIENCE)
        wait_until(lambda: not keys())
        waits.revoke()

    @pytest.mark.parametrize("task", [tasks.once_all_arguments, tasks.singleton_all_arguments])
    def test_a_message_that_is_revoked_leaves_its_key(self, worker, keys, task):
        result = task.apply_async(["k", 0], countdown=1)
        result.revoke()
        wait_until(lambda: result.state == states.REVOKED)
        assert keys()

    def test_a_singleton_that_retries_itself_stays_in_retry(self, worker, keys):
        result = tasks.singleton_retries_itself.delay("k")
        wait_until(lambda: f"[{result.id}] retry: " in worker.log)
        # Whatever was sent has come before this.
        tasks.singleton_skips.delay("sentinel").get(timeout=PATIENCE)
        assert result.state == states.RETRY
        assert keys()

    def test_what_is_one_key_to_them(self):
        once, singleton = tasks.once_all_arguments, tasks.singleton_all_arguments
        assert once.get_key(("1",)) == once.get_key((1,)) == once.get_key((), {"key": 1})
        assert once.get_key((1,)) != once.get_key((1, 0.0))
        ways = [([1], {}), ([1, 0.0], {}), ([], {"key": 1})]
        assert len({singleton.generate_lock("name", *way) for way in ways}) == 3


class TestBothAtOnce:
    @pytest.mark.parametrize("task", [tasks.once_skips, tasks.singleton_skips])
    def test_runs_are_kept_apart_that_the_key_lets_through(self, worker, keys, task):
        first = task.delay("k", 1)
        wait_until(lambda: begun("k") == 1)
        assert app.send_task(task.name, ["k", 0]).get(timeout=PATIENCE) == "skipped"
        # Whoever is skipped deletes it.
        wait_until(lambda: not keys())
        assert first.get(timeout=PATIENCE) == "done"
        assert begun("k") == 1

    def test_one_runs_and_one_waits_and_a_third_is_refused(self, worker, keys):
        first = tasks.once_waits.delay("k", 1)
        wait_until(lambda: begun("k") == 1)
        second = tasks.once_waits.delay("k")
        with pytest.raises(celery_once.AlreadyQueued):
            tasks.once_waits.delay("k")
        assert [first.get(timeout=PATIENCE), second.get(timeout=PATIENCE)] == ["done", "done"]
        assert begun("k") == 2
        assert most_at_once("k") == 1

    def test_whoever_gives_up_waiting_leaves_its_key(self, worker, keys):
        with held_elsewhere('once.gives_up(key="k")'):
            result = tasks.once_gives_up.delay("k")
            wait_until(lambda: result.state == states.FAILURE)
        assert keys() == ["qo_once.gives_up_key-k"]

    def test_a_retry_for_the_lock_meets_the_tasks_own_key(self, worker, keys):
        with held_elsewhere('once.comes_back(key="k")'):
            result = tasks.once_comes_back.delay("k")
            with pytest.raises(celery_once.AlreadyQueued):
                result.get(timeout=PATIENCE)

    @pytest.mark.parametrize("task", [tasks.once_comes_back_gracefully, tasks.singleton_comes_back])
    def test_a_retry_that_is_refused_quietly_never_comes(self, worker, keys, task):
        with held_elsewhere(f'{task.name}(key="k")'):
            result = task.delay("k")
            wait_until(lambda: f"[{result.id}] retry: " in worker.log)
        # It would come within 0.1 s, and before what is sent twice after it.
        for _ in range(2):
            tasks.moved.apply_async(["sentinel"], countdown=1).get(timeout=PATIENCE)
        assert result.state == states.RETRY
        assert not begun("k")


def test_a_key_that_an_old_sender_has_set_is_left_by_a_new_worker(worker, keys):
    tasks.once_all_arguments.once_backend.raise_or_lock("qo_moved_key-k", timeout=60)
    assert app.send_task("moved", ["k"]).get(timeout=PATIENCE) == "done"
    assert keys() == ["qo_moved_key-k"]


def test_a_key_that_a_new_sender_has_not_set_is_nothing_to_an_old_worker(worker, keys):
    assert app.send_task("once.all_arguments", ["k"]).get(timeout=PATIENCE) == "done"
    assert not keys()
