"""Tasks that are critical, and tasks that are in their way: only the first time that they run."""

import os
import time
from contextlib import suppress

from celery import Task
from django.db import OperationalError, connection, transaction

from celery_pglock import AdvisoryTask, Retry, Skip, XactAdvisoryTask, advisory
from celery_pglock.bootsteps import PrioritizeCriticalTasks
from celery_pglock.conflicts import PREEMPTED
from celery_pglock.models import KeyState
from celery_pglock.tasks import prioritize_critical_tasks
from tests.celery_app import app
from tests.models import Entry

# Longer than any test waits.
LONG = 60

CRITICAL = 5

app.conf.worker_max_tasks_per_child = int(os.environ.get("TASKS_PER_CHILD", "1000"))
app.conf.task_routes = {prioritize_critical_tasks.name: {"queue": "critical-own-queue"}}
app.conf.beat_schedule = {
    "prioritize critical tasks": {
        "task": prioritize_critical_tasks.name,
        "schedule": 1.0,
        "kwargs": {"min_wait": 0.5, "grace": 0.2},
        "options": {"expires": 1.0},
    }
}


class EverySecond(PrioritizeCriticalTasks):
    interval = float(os.environ.get("INTERVAL", "1"))
    min_wait = float(os.environ.get("MIN_WAIT", "0.5"))
    grace = 0.2
    max_victims = int(os.environ.get("MAX_VICTIMS", "5"))


if os.environ.get("BOOTSTEP"):
    app.steps["worker"].add(EverySecond)


def note(task: Task, key: str, what: str) -> None:
    Entry.objects.create(key=key, task_id=task.request.id, what=what)


def is_first_run(task: Task) -> bool:
    return PREEMPTED not in (task.request.headers or {})


def sleep() -> None:
    time.sleep(LONG)


def ask_postgresql() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [LONG])


def lock_the_table() -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {KeyState._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        time.sleep(LONG)


def ignore_errors() -> None:
    """As code with a retry of its own does; of the end of its session it learns by the next query."""
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        with suppress(OperationalError):
            ask_postgresql()


WAYS = {way.__name__: way for way in (sleep, ask_postgresql, lock_the_table, ignore_errors)}


def work(task: Task, key: str, way: str) -> str:
    note(task, key, "begins")
    if is_first_run(task):
        WAYS[way]()
    note(task, key, "ends")
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(0.2, 0.4))
def holds(self, key, way="sleep"):
    return work(self, key, way)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def holds_or_skips(self, key, way="sleep"):
    return work(self, key, way)


@app.task(base=XactAdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(0.2, 0.4))
def holds_in_a_transaction(self, key, way="ask_postgresql"):
    return work(self, key, way)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=1, lock_priority=CRITICAL)
def as_critical_holds(self, key, way="sleep"):
    return work(self, key, way)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=LONG, lock_side_effect=Skip("no"))
def waits_its_turn(self, key):
    note(self, key, "begins")
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=LONG, lock_priority=CRITICAL)
def critical(self, key, seconds=0.0):
    note(self, key, "begins")
    time.sleep(seconds)
    note(self, key, "ends")
    return "through"


@app.task(base=AdvisoryTask, lock_key="critical nested", lock_timeout=LONG, lock_priority=CRITICAL)
def critical_nested(key):
    with advisory(key, timeout=LONG) as is_mine:
        return is_mine


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=LONG, lock_priority=CRITICAL + 1)
def more_critical(self, key):
    return "through"


@app.task(
    base=AdvisoryTask, lock_key="critical reader", lock_shared=True, lock_timeout=1, lock_priority=CRITICAL
)
def critical_reader():
    return KeyState.objects.count()


@app.task(base=AdvisoryTask, lock_key="critical writer", lock_timeout=1, lock_priority=CRITICAL)
def critical_writer(key):
    return Entry.objects.filter(key=key).update(what="ends")
