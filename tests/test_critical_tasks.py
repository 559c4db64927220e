"""Critical tasks get through: who is in their way is stopped, and comes back."""

import pytest
from celery import states

from celery_pglock.models import Act, BlockedPGLock
from celery_pglock.tasks import prioritize_critical_tasks
from tests.conftest import running_worker, wait_until
from tests.critical_tasks import critical, critical_reader, holds
from tests.models import Entry


@pytest.fixture(scope="module")
def _children(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), running_worker("critical", concurrency=4, TASKS="critical_tasks") as worker:
        yield worker


@pytest.fixture
def send(_children, rival):
    """Sends a task to a prefork worker."""

    def send(task, *args):
        return task.apply_async(args, queue=_children.queue)

    send.worker = _children
    return send


def clear(**options):
    return prioritize_critical_tasks(**{"min_wait": 0, "grace": 0, **options})


def begun(key, times=1):
    wait_until(lambda: Entry.objects.filter(key=key, what="begins").count() >= times, f"{key} begins")


def waiting(times=1):
    wait_until(lambda: BlockedPGLock.objects.count() >= times, "somebody waits")


@pytest.mark.parametrize("way", ["sleep", "ask_postgresql"])
def test_a_task_that_holds_the_key_of_a_critical_one_makes_way_and_comes_back(send, way):
    victim = send(holds, "k", way)
    begun("k")
    result = send(critical, "k")
    waiting()
    print(clear())
    assert result.get(timeout=5) == "through"
    print(list(Act.objects.values()))
    wait_until(lambda: victim.state in ("RETRY", "SUCCESS"))
    print(victim.state, victim.result)
    assert victim.get(timeout=10) == "done"
    print(send.worker.log)
    assert 0
