"""What docs/how-to/why-is-my-task-not-running.md shows is what real workers and real servers say."""

import os
import re
import subprocess
import sys
import uuid
from contextlib import contextmanager

import pytest
import redis
from django.db import connection, connections

from celery_pglock import advisory
from tests import night_tasks as tasks
from tests.bystanders import bystanders
from tests.celery_app import app
from tests.conftest import running_worker, wait_until
from tests.documents import ROOT
from tests.models import Entry
from tests.nights import QUEUE, logged, send
from tests.servers import Cluster

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.long]

PAGE = ROOT / "docs" / "how-to" / "why-is-my-task-not-running.md"
DIFFERS = re.compile(r"[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}|\d+(?:\.\d+)?|…|(?<= on )\w+@\w+")


def alike(line):
    """A line without what differs from run to run."""
    return DIFFERS.sub("_", line.replace("tests.night_tasks.", "shop.tasks.")).strip()


def is_on_the_page(line):
    return alike(line) in {alike(one) for one in PAGE.read_text().splitlines()}


def environment():
    database = connection.settings_dict["NAME"]
    return {**os.environ, "TEST_DATABASE_NAME": database, "TASKS": "night_tasks"}


def celery(*arguments):
    """What `celery -A proj …` says."""
    command = [sys.executable, "-m", "celery", "-A", "tests.celery_app", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def why(name):
    """The lines of `manage.py pglock --why`."""
    command = [sys.executable, "-m", "django", "pglock", "--why", name]
    env = {**environment(), "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def _night_worker(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), running_worker(QUEUE, TASKS="night_tasks") as worker:
        yield worker


@pytest.fixture
def worker(_night_worker, transactional_db):
    return _night_worker


@contextmanager
def held(rival, name):
    rival.take(name)
    yield
    rival.give_back(name)


def test_a_worker_that_does_not_start_says_why_on_its_last_line():
    with (
        pytest.raises(AssertionError, match="exit code 1") as failure,
        running_worker("nights-refused", MISSPELT_OPTION="yes"),
    ):
        pass
    log, _, _ = str(failure.value).partition("\nassert ")
    assert "lock_kei" in log.strip().splitlines()[-1], log


def test_where_no_worker_runs_a_ping_says_so():
    assert "**`Error: No nodes replied within time constraint`**" in PAGE.read_text()
    assert "Error: No nodes replied within time constraint" in celery("inspect", "ping", "-d", "nobody@here")


def test_a_worker_tells_its_queues_and_the_tasks_that_it_knows(worker):
    assert f"'name': '{QUEUE}'" in celery("inspect", "active_queues")
    registered = celery("inspect", "registered")
    assert "tests.night_tasks.import_account" in registered
    app.send_task("tests.night_tasks.gone", queue=QUEUE)
    assert "tests.night_tasks.gone" not in registered
    line = logged(worker, "Received unregistered task").replace("gone", "import_account")
    assert is_on_the_page(line)
    assert is_on_the_page(logged(worker, "has been ignored and discarded"))


def test_tasks_that_wait_take_all_slots_and_the_next_one_is_reserved(worker, rival):
    with held(rival, "import:42"):
        waiting = [send(tasks.close_account, 42) for _ in range(2)]
        wait_until(lambda: rival.sees_held("import:42", granted=False) == 2)
        behind = send(tasks.sync_stock, "south")
        logged(worker, behind.id, "received")
        active = celery("inspect", "active")
        assert all(one.id in active for one in waiting)
        assert behind.id not in active
        assert behind.id in celery("inspect", "reserved")
        locks = celery("inspect", "locks")
        assert (locks.count("'granted': False"), locks.count("'granted': True")) == (2, 0)
        assert (behind.state, waiting[0].state) == ("PENDING", "STARTED")
        assert sum("waited for by tests.night_tasks.close_account" in line for line in why("import:42")) == 2
    assert behind.get(timeout=20) == "synced"


def test_a_task_whose_lock_is_taken_comes_back_and_the_log_says_why(worker, rival):
    with held(rival, "import:42"):
        coming_back = send(tasks.import_account, 42)
        wait_until(lambda: worker.log.count(f"{coming_back.id}] retry") > 2)
        assert is_on_the_page(logged(worker, coming_back.id, "without waiting"))
        assert coming_back.state == "RETRY"
        scheduled = celery("inspect", "scheduled")
        assert "'eta': " in scheduled
        assert coming_back.id in scheduled
    assert coming_back.get(timeout=30) == "imported"


def test_a_task_comes_back_while_postgresql_is_away():
    nowhere = {"DATABASE_URL": "postgresql://postgres@127.0.0.1:1/nowhere", "TASKS": "night_tasks"}
    with running_worker("nights-away", **nowhere) as worker:
        coming_back = tasks.import_account.apply_async([42], queue="nights-away")
        assert is_on_the_page(logged(worker, coming_back.id, "did not run and comes back"))
        wait_until(lambda: coming_back.state == "RETRY")
    with redis.from_url(app.conf.broker_url) as client:
        client.delete("nights-away")


def test_a_copy_of_a_message_is_ignored(worker, rival):
    task_id = str(uuid.uuid4())
    first = send(tasks.import_account, 43, 3, task_id=task_id)
    wait_until(lambda: rival.sees_held("import:43"))
    send(tasks.import_account, 43, 3, task_id=task_id)
    assert is_on_the_page(logged(worker, task_id, "ignored"))
    assert first.state == "STARTED"
    assert first.get(timeout=20) == "imported"


def test_a_skip_is_told_with_the_holder(worker, rival):
    with held(rival, "import:42"):
        skipped = send(tasks.refresh_account, 42)
        assert skipped.get(timeout=20) is None
        assert is_on_the_page(logged(worker, skipped.id, "skipped"))


def test_who_holds_a_key_is_told(worker, rival):
    with held(rival, 42):
        assert all(map(is_on_the_page, why("42")))
    assert is_on_the_page("lock 'import:42': free to take")
    assert why("import:42") == ["lock 'import:42': free to take"]
    running = send(tasks.import_account, 42, 3)
    wait_until(lambda: rival.sees_held("import:42"))
    waiting = send(tasks.close_account, 42)
    wait_until(lambda: rival.sees_held("import:42", granted=False))
    told = why("import:42")
    assert len(told) == 3
    assert all(map(is_on_the_page, told))
    assert running.get(timeout=20) == "imported"
    assert waiting.get(timeout=20) == "closed"


def test_what_the_holder_waits_for_is_told_up_to_the_root(worker, rival):
    Entry.objects.create(key="north", task_id="", what="x")
    with bystanders() as make:
        prompt = make(application_name="psql")
        prompt.does("BEGIN", "UPDATE tests_entry SET what = 'y'")
        waiting = send(tasks.sync_stock, "north")
        wait_until(lambda: rival.ask("SELECT count(*) FROM pg_locks WHERE waitstart IS NOT NULL"))
        told = why("stock:north")
        assert len(told) == 4
        assert all(map(is_on_the_page, told)), told
        prompt.does("ROLLBACK")
        assert waiting.get(timeout=20) == "synced"


@pytest.mark.django_db(transaction=True, databases=["default", "locks"])
def test_a_prepared_transaction_is_named_as_the_holder(monkeypatch):
    locks = connections["locks"]
    with Cluster(max_prepared_transactions="1") as cluster:
        locks.close()
        here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
        for name, value in here.items():
            monkeypatch.setitem(locks.settings_dict, name, value)
        try:
            with bystanders("locks") as make:
                make().does("BEGIN", "SELECT pg_advisory_xact_lock(77)", "PREPARE TRANSACTION 'forgotten'")
                told = str(advisory(77, using="locks").explain())
                make().does("ROLLBACK PREPARED 'forgotten'")
        finally:
            locks.close()
    line = "held by a transaction that was prepared (see pg_prepared_xacts)"
    assert told == f"lock '77': taken\n  {line}"
    assert f"**`{line}`.**" in PAGE.read_text()


def test_a_task_whose_session_was_ended_fails_and_does_not_run_again(worker, rival):
    lost = send(tasks.import_account, 42, 30)
    wait_until(lambda: rival.sees_held("import:42"))
    rival.ask(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        f" WHERE application_name = 'pglock:{lost.id}' AND locktype = 'advisory'"
    )
    assert is_on_the_page(logged(worker, lost.id, "lost lock"))
    wait_until(lambda: lost.state == "FAILURE")
    assert "LockLost" in repr(lost.result)


def test_a_task_that_celery_terminates_leaves_its_lock_free(worker, rival):
    stopped = send(tasks.import_account, 42, 30)
    wait_until(lambda: rival.sees_held("import:42"))
    celery("control", "terminate", "SIGTERM", stopped.id)
    wait_until(lambda: not rival.sees_held("import:42"))
    wait_until(lambda: stopped.state == "REVOKED")


def test_without_locks_a_task_runs_while_somebody_holds_its_key_and_nothing_is_said(rival):
    variables = {"TASKS": "night_tasks", "PGLOCK_SETTINGS": '{"ENABLED": false}'}
    with held(rival, "import:42"), running_worker("nights-off", **variables) as worker:
        assert tasks.import_account.apply_async([42], queue="nights-off").get(timeout=20) == "imported"
        assert "import:42" not in worker.log
