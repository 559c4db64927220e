"""How many connections locks open, and how many statements they send, as the server's own log has it."""

import threading

import pytest
from django.db import connections

from celery_pglock import advisory
from celery_pglock.pool import pool
from tests.conftest import running_worker, wait_until
from tests.counted_tasks import done, nested_locks, one_lock
from tests.servers import Cluster

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.long]

TIMES = 1000
CONNECTED = "connection authorized"
OF_LOCKS = "statement: /*pglock:1 "


@pytest.fixture(scope="module")
def cluster(django_db_setup):
    with Cluster(log_connections="on", log_statement="all") as cluster:
        here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
        connections.databases["counted"] = {**connections.databases["default"], **here}
        yield cluster
        pool().close_idle()
        connections["counted"].close()
        del connections["counted"]
        del connections.databases["counted"]


@pytest.fixture
def opened(cluster, pooled):
    """How many connections were opened since the test began; nobody but locks uses this server."""
    pool().close_idle()
    before = cluster.log.count(CONNECTED)
    yield lambda: cluster.log.count(CONNECTED) - before
    pool().close_idle()


def test_a_thousand_locks_one_after_the_other_share_one_connection(opened):
    for number in range(TIMES):
        with advisory(f"alone:{number}", using="counted"):
            pass
    assert opened() == 1


def test_locks_in_each_other_share_one_connection(opened):
    for number in range(TIMES // 10):
        with advisory("outer", using="counted"), advisory(f"inner:{number}", using="counted", timeout=1):
            pass
    assert opened() == 1


def test_there_are_as_many_connections_as_threads_that_hold_locks_at_once(opened):
    together = threading.Barrier(3)

    def hold(name):
        for number in range(TIMES // 10):
            with advisory(f"{name}:{number}", using="counted"):
                together.wait(10)

    for _ in range(2):
        threads = [threading.Thread(target=hold, args=[name]) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert opened() == 3


@pytest.mark.parametrize(("kind", "children"), [("solo", 1), ("prefork", 2)])
def test_a_thousand_tasks_open_one_connection_in_each_process_and_ask_twice_for_each_lock(
    cluster, opened, kind, children
):
    queue = f"counted-{kind}"
    variables = {"DATABASE_URL": cluster.url, "TEST_DATABASE_NAME": "postgres", "TASKS": "counted_tasks"}
    with running_worker(
        queue, "--prefetch-multiplier=100", pool=kind, concurrency=children, **variables
    ) as worker:
        started, asked = opened(), cluster.log.count(OF_LOCKS)
        for number in range(TIMES):
            (nested_locks if number % 4 == 0 else one_lock).apply_async([number], queue=queue)
        wait_until(lambda: worker.log.count("succeeded in") >= TIMES, "all have run", 60)
        assert done.apply_async(queue=queue).get(timeout=20) is None
    assert opened() - started == children
    # Each fourth task takes two more locks inside of its own.
    assert cluster.log.count(OF_LOCKS) - asked == 2 * (TIMES + 2 * (TIMES // 4))
