"""The commands ``celery pglock`` and ``celery inspect locks``."""

import getpass
import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from types import SimpleNamespace

import pytest
from django.db import connection

from celery_pglock import inspections
from celery_pglock.models import Act, PGActivity, PGLock
from tests.celery_app import app
from tests.conftest import PATIENCE, Rival, running_worker, wait_until
from tests.models import Entry
from tests.worker_tasks import skips, waits

# Celery finds commands in the metadata of what is installed.
NOT_INSTALLED = "No such command 'pglock'"


class Answer:
    def __init__(self, out, err, code):
        assert NOT_INSTALLED not in err, "the entry point is missing: run pip install -e . again"
        self.out, self.err, self.code = out, err, code

    @property
    def json(self):
        return json.loads(self.out)


def process_of(*arguments, app="tests.celery_app", **variables):
    environment = {**os.environ, "TEST_DATABASE_NAME": connection.settings_dict["NAME"], **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-m", "celery", *(["-A", app] if app else []), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def celery(*arguments, **options):
    with process_of(*arguments, **options) as process:
        out, err = process.communicate(timeout=30)
    return Answer(out, err, process.returncode)


def error_of(answer):
    assert answer.out == ""
    assert len(answer.err.splitlines()) == 1
    return answer.err.removeprefix("Error: ").strip()


def pid_of(somebody):
    return somebody.connection.info.backend_pid


@pytest.fixture
def waiting(rival):
    """One that holds key 7, and one that waits for it."""
    waiter = Rival()
    rival.take(7)
    waiter.connection.pgconn.send_query(b"SELECT pg_advisory_lock(7)")
    wait_until(lambda: rival.sees_held(7, granted=False), "somebody waits")
    yield rival, waiter
    with connection.cursor() as cursor:
        pids = [pid_of(rival), pid_of(waiter)]
        cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = ANY(%s)", [pids])
    wait_until(lambda: not PGActivity.objects.filter(pk__in=pids).exists(), "they have left")
    waiter.connection.close()


# celery pglock


def test_list_shows_the_locks_that_were_chosen(waiting):
    holder, waiter = waiting
    chosen = ["-f", "type=ADVISORY", "-a", "activity_id", "-a", "granted"]
    answer = celery("pglock", "list", *chosen, "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.json == [
        {"activity_id": pid_of(waiter), "granted": False},
        {"activity_id": pid_of(holder), "granted": True},
    ]


def test_tree_shows_who_waits_for_whom(waiting):
    holder, waiter = waiting
    answer = celery("pglock", "tree")
    first, second = answer.out.splitlines()
    assert first.startswith(f"{pid_of(holder)} ")
    assert second.startswith(f"    {pid_of(waiter)} ")


def test_why_tells_who_holds_a_key_by_its_exit_code_too(rival):
    rival.take(-7)
    taken = celery("pglock", "why", "--json", "--", "-7")
    assert (taken.code, taken.json["would_run"]) == (3, False)
    assert [one["pid"] for one in taken.json["holders"]] == [pid_of(rival)]
    free = celery("pglock", "why", "report")
    assert (free.code, free.out) == (0, "lock 'report': free to take\n")


def test_what_only_shows_stops_nobody_whatever_its_configuration(waiting):
    holder, _ = waiting
    configs = {"mine": {"pids": [pid_of(holder)], "terminate": True, "yes": True}}
    settings = {"PGLOCK_SETTINGS": json.dumps({"CONFIGS": configs})}
    shown = celery("pglock", "list", "-c", "mine", "-a", "activity_id", **settings)
    assert shown.out.split() == ["activity_id", str(pid_of(holder))]
    assert not Act.objects.exists()
    stopped = celery("pglock", "stop", "-c", "mine", **settings)
    assert (stopped.code, stopped.out) == (0, f"backend {pid_of(holder)}: terminated (it has ended)\n")


def test_stop_names_whom_it_stops_and_the_audit_names_who_did_it(waiting):
    holder, waiter = waiting
    answer = celery("pglock", "stop", str(pid_of(waiter)), "--blocking", "--terminate", "--yes", "--json")
    assert answer.code == 0
    assert answer.err.startswith(f"backend {pid_of(holder)}: ")
    assert [(one["pid"], one["is_done"]) for one in answer.json] == [(pid_of(holder), True)]
    act = Act.objects.get()
    assert (act.through, act.by, act.action, act.pid) == (
        "celery",
        getpass.getuser(),
        "terminate",
        pid_of(holder),
    )


def test_nobody_is_stopped_whom_nobody_confirmed(waiting):
    holder, _ = waiting
    answer = celery("pglock", "stop", str(pid_of(holder)), "--terminate")
    named, refused = answer.err.splitlines()
    assert named.startswith(f"backend {pid_of(holder)}: ")
    assert "confirm by --yes" in refused
    assert (answer.code, answer.out) == (1, "")
    assert PGActivity.objects.filter(pk=pid_of(holder)).exists()


def test_errors_are_told_in_one_line_with_the_exit_codes_of_the_other_command(transactional_db):
    wrong = celery("pglock", "list", "-d", "default2")
    assert "'default2', which is not in DATABASES. Did you mean 'default'?" in error_of(wrong)
    assert wrong.code == 1
    neither = celery("pglock", "stop", "1")
    assert error_of(neither) == "Nothing says how they are to be stopped: add --cancel or --terminate."
    assert neither.code == 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "There are no Django settings: set DJANGO_SETTINGS_MODULE, or name by celery -A an app"),
        ("tests.nowhere", "Django cannot be set up: No module named 'tests.nowhere'"),
        ("django.conf.global_settings", "'celery_pglock' is missing in INSTALLED_APPS."),
    ],
)
def test_what_django_lacks_is_told_in_one_line(module, message, transactional_db):
    answer = celery("pglock", "tree", app=None, DJANGO_SETTINGS_MODULE=module)
    assert message in error_of(answer)
    assert answer.code == 1


def test_watching_ends_well_when_it_is_interrupted(transactional_db):
    with process_of("pglock", "why", "x", "--json", "--watch", "0.1") as process:
        looks = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert [look["would_run"] for look in looks] == [True, True]
    assert process.returncode == 0


# celery inspect locks


def ask(name):
    """What the worker of this name answers; nobody else is asked."""
    (answer,) = app.control.broadcast("locks", reply=True, destination=[name], timeout=10)
    return answer[name]


def hold(queue, key):
    """Two tasks, one of which holds the key while the other waits for it."""
    holder = skips.apply_async([key, 60], queue=queue)
    wait_until(lambda: Entry.objects.filter(key=key, what="begins").exists(), "the task holds its lock")
    waiter = waits.apply_async([key], queue=queue)
    wait_until(lambda: PGLock.objects.filter(granted=False, task_id=waiter.id).exists(), "the other waits")
    return holder, waiter


def end(*results):
    for result in reversed(results):
        result.revoke(terminate=True, signal="SIGKILL")
    wait_until(lambda: not PGLock.objects.filter(name="report").exists(), "their locks are free")


def test_a_worker_lists_what_its_tasks_hold_and_wait_for_and_nothing_else(worker, rival):
    rival.take("somebody else's")
    holder, waiter = hold("celery", "report")
    answer = celery("inspect", "locks", "--json", "-t", "10", "-d", "celery@test")
    end(holder, waiter)
    waits_for, holds = answer.json["celery@test"]
    assert waits_for.pop("wait_duration") >= 0
    began = Entry.objects.get(key="report", what="begins").at
    assert abs((datetime.fromisoformat(holds.pop("since")) - began).total_seconds()) < 5
    assert waits_for.pop("pid") != holds.pop("pid")
    assert waits_for == {
        "key": "report",
        "task_name": "tests.worker_tasks.waits",
        "task_id": waiter.id,
        "mode": "EXCLUSIVE",
        "granted": False,
        "since": None,
    }
    assert holds == {
        "key": "report",
        "task_name": "tests.worker_tasks.skips",
        "task_id": holder.id,
        "mode": "EXCLUSIVE",
        "granted": True,
        "wait_duration": None,
    }


def test_a_worker_that_was_asked_keeps_no_connection(worker, rival):
    before = rival.ask("SELECT clock_timestamp()")
    assert ask("celery@test") == []
    newer = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_start > %s"
    wait_until(lambda: not rival.ask(newer, before), "it has left")


def test_a_worker_that_cannot_tell_answers_why_and_goes_on(worker, rival):
    rival.connection.execute("ALTER VIEW celery_pglock_pglock RENAME TO away")
    try:
        error = ask("celery@test")["error"]
    finally:
        rival.connection.execute("ALTER VIEW away RENAME TO celery_pglock_pglock")
    assert "run manage.py migrate celery_pglock --database=default" in error
    assert ask("celery@test") == []


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_workers_that_run_tasks_in_one_process_list_them_too(pool, rival):
    with running_worker(f"inspected-{pool}", pool=pool) as worker:
        holder, waiter = hold(worker.queue, "report")
        found = ask(f"{worker.queue}@test")
        assert [(one["task_id"], one["granted"]) for one in found] == [(waiter.id, False), (holder.id, True)]


def test_a_solo_worker_answers_between_its_tasks(rival):
    with running_worker("inspected-solo", pool="solo") as worker:
        assert skips.apply_async(["report"], queue=worker.queue).get(timeout=10) == "done"
        assert ask(f"{worker.queue}@test") == []


def test_a_worker_that_was_not_started_by_the_celery_command_answers_too():
    code = "from tests.celery_app import app; from celery.worker.control import Panel; import celery_pglock;"
    code += " app.loader.import_default_modules(); before = 'locks' in Panel.meta;"
    code += " app.WorkController(pool='solo'); print(before, 'locks' in Panel.meta)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False True\n"


def test_a_database_that_hangs_holds_up_no_worker(rival, monkeypatch):
    monkeypatch.setattr(inspections, "PATIENCE", 0.2)
    # LOCK TABLE would lock all that the view reads, too: the catalogue of the whole cluster.
    rival.connection.execute("BEGIN; ALTER VIEW celery_pglock_pglock SET (security_barrier = false)")
    state = SimpleNamespace(hostname="celery@nowhere")
    assert inspections.locks(state) == {"error": "The database did not answer within 0.2 s."}
    assert "before this one" in inspections.locks(state)["error"]
    rival.connection.execute("ROLLBACK")
    monkeypatch.setattr(inspections, "PATIENCE", PATIENCE)
    wait_until(lambda: inspections.locks(state) == [], "it answers again")
