"""Where no lock can be taken the body does not run, and the message stays."""

import re
from contextlib import ExitStack

import psycopg
import pytest
from celery import states
from django.core.management import call_command
from django.db import OperationalError, connections

from celery_pglock import AdvisoryTask, advisory
from tests.celery_app import app
from tests.conftest import running_worker, wait_until
from tests.outage_tasks import (
    in_transaction_in_outages,
    raises_in_outages,
    skips_in_outages,
    strict_in_outages,
    tells_headers_in_outages,
    waits_in_transaction_in_outages,
)
from tests.servers import Cluster

TASKS = [skips_in_outages, raises_in_outages, in_transaction_in_outages, strict_in_outages]


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster(django_db_setup, django_db_blocker):
    with Cluster() as cluster, django_db_blocker.unblock():
        connections.databases["outages"] = {
            **connections.databases["default"],
            "HOST": "127.0.0.1",
            "PORT": str(cluster.port),
            "NAME": "postgres",
            "USER": "postgres",
        }
        call_command("migrate", "celery_pglock", database="outages", verbosity=0)
        connections["outages"].close()
        yield cluster
        del connections["outages"]
        del connections.databases["outages"]


@pytest.fixture(scope="module")
def _worker(cluster, tmp_path_factory, django_db_blocker):
    journal = tmp_path_factory.mktemp("outages") / "journal"
    journal.touch()
    variables = {"DATABASE_URL": cluster.url, "TEST_DATABASE_NAME": "postgres", "TASKS": "outage_tasks"}
    with (
        django_db_blocker.unblock(),
        running_worker("outages", concurrency=2, JOURNAL=str(journal), **variables) as worker,
    ):
        worker.journal = journal
        yield worker


@pytest.fixture
def worker(_worker, transactional_db):
    """A worker on a server of the tests' own."""
    return _worker


def ran(worker, result):
    return worker.journal.read_text().count(result.id)


def did_not_run(worker, *results):
    for result in results:
        wait_until(lambda: result.state == states.RETRY, f"{result} comes back later")  # noqa: B023
        assert not ran(worker, result)


def test_a_restart_costs_time_only(worker, cluster):
    cluster.stop("immediate")
    results = [task.apply_async([task.name], queue=worker.queue) for task in TASKS]
    did_not_run(worker, *results)
    assert "did not run and comes back in" in worker.log
    cluster.start()
    assert [result.get(timeout=30) for result in results] == ["done"] * len(TASKS)
    assert [ran(worker, result) for result in results] == [1] * len(TASKS)


def test_an_outage_is_no_retry_of_the_tasks_and_its_count_is_forgotten(worker, cluster):
    cluster.stop("fast")
    result = tells_headers_in_outages.apply_async(["k"], queue=worker.queue)
    did_not_run(worker, result)
    cluster.start()
    assert result.get(timeout=30) == [1, None]


def test_a_server_that_takes_no_more_connections(worker, cluster):
    with psycopg.connect(cluster.url, autocommit=True) as keeper:
        # Idle sessions of the worker would do for it.
        keeper.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        room = keeper.execute("SELECT current_setting('max_connections')::int").fetchone()[0]
        with ExitStack() as everybody:
            for _ in range(room - 1):
                everybody.enter_context(psycopg.connect(cluster.url))
            results = [task.apply_async([task.name], queue=worker.queue) for task in TASKS]
            did_not_run(worker, *results)
    assert [result.get(timeout=30) for result in results] == ["done"] * len(TASKS)


def test_a_server_that_has_no_memory_for_locks(worker, cluster):
    with psycopg.connect(cluster.url) as greedy:
        with pytest.raises(psycopg.errors.OutOfMemory):
            greedy.execute("SELECT pg_advisory_lock(number) FROM generate_series(1, 1000000) AS number")
        results = [task.apply_async([task.name], queue=worker.queue) for task in TASKS]
        did_not_run(worker, *results)
    assert [result.get(timeout=30) for result in results] == ["done"] * len(TASKS)


def test_a_server_that_takes_no_writes_has_no_strict_locks(worker, cluster):
    with psycopg.connect(cluster.url, autocommit=True) as keeper:
        keeper.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        keeper.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        try:
            result = strict_in_outages.apply_async(["k"], queue=worker.queue)
            did_not_run(worker, result)
            assert skips_in_outages.apply_async(["k"], queue=worker.queue).get(timeout=10) == "done"
        finally:
            keeper.execute("SET default_transaction_read_only = off")
            keeper.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
            keeper.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            )
    assert result.get(timeout=30) == "done"


def test_a_copy_of_a_message_leaves_the_state_alone(worker, cluster):
    cluster.stop("fast")
    result = skips_in_outages.apply_async(["k"], queue=worker.queue, headers={"pglock_copy": True})
    wait_until(lambda: worker.log.count(f"[{result.id}] did not run and comes back") == 2)
    assert result.state in (states.PENDING, states.STARTED)
    cluster.start()
    assert result.get(timeout=30) == "done"


def test_a_wait_that_the_server_cuts_short_is_a_conflict(worker, cluster):
    with psycopg.connect(cluster.url, autocommit=True) as holder:
        holder.execute("ALTER ROLE postgres SET statement_timeout = '200ms'")
        holder.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        holder.execute("SELECT pg_advisory_lock(%s)", advisory("taken").keys[0].arguments)
        try:
            result = waits_in_transaction_in_outages.apply_async(["taken"], queue=worker.queue)
            assert result.get(timeout=10) == "skipped"
        finally:
            holder.execute("ALTER ROLE postgres RESET statement_timeout")


def test_a_worker_with_strict_tasks_needs_their_table(worker, cluster):
    with psycopg.connect(cluster.url, autocommit=True) as keeper:
        keeper.execute("CREATE DATABASE unmigrated")
    refused = re.compile("exit code [1-9].*no table for them.*migrate --database=default", re.DOTALL)
    with (
        pytest.raises(AssertionError, match=refused),
        running_worker(
            "unmigrated", DATABASE_URL=cluster.url, TEST_DATABASE_NAME="unmigrated", TASKS="outage_tasks"
        ),
    ):
        pass


def test_without_a_message_the_error_is_the_callers(cluster):
    @app.task(shared=False, base=AdvisoryTask, lock_key="k", lock_using="outages", lock_on_direct_call=True)
    def asks():
        pytest.fail("it must not run")

    cluster.stop("fast")
    try:
        for call in (asks, lambda: asks.apply(throw=True), advisory("k", using="outages").acquire):
            with pytest.raises(OperationalError, match="refused"):
                call()
    finally:
        # Other tests check all tasks of the app, and know no such alias.
        app.tasks.unregister(asks.name)
        cluster.start()


def test_a_broker_that_refuses_the_message_makes_the_task_wait_in_place(worker, cluster, broker):
    cluster.stop("fast")
    result = skips_in_outages.apply_async(["k"], queue=worker.queue, countdown=1)
    with broker.refuses_messages():
        wait_until(lambda: "or until the broker takes its retry" in worker.log)
        assert not ran(worker, result)
    cluster.start()
    assert result.get(timeout=30) == "done"
