"""Tasks that lose their locks, and tell how they learn of it."""

import time

from celery import Task
from django.db import connection

from celery_pglock import AdvisoryTask, LockLost, Retry, Skip, advisory
from tests.celery_app import app
from tests.models import Entry


def note(task: Task, key: str, what: str) -> None:
    Entry.objects.create(key=key, task_id=task.request.id, what=what)


def sleep(task, seconds):
    time.sleep(seconds)


def ask_postgresql(task, seconds):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", [seconds])


def compute(task, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def check(task, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        task.lock.check()
        time.sleep(0.01)


WAYS = {way.__name__: way for way in (sleep, ask_postgresql, compute, check)}


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def tells_when_it_is_interrupted(self, key, way, seconds=20.0):
    note(self, key, "begins")
    try:
        WAYS[way](self, seconds)
    except LockLost as lost:
        return [time.time(), str(lost)]
    return "nobody told"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def is_interrupted(self, key, way="sleep", seconds=20.0):
    note(self, key, "begins")
    WAYS[way](self, seconds)
    return "done"


@app.task(
    base=AdvisoryTask, bind=True, lock_key="{key}", lock_on_lost="fail", lock_side_effect=Skip("skipped")
)
def fails_at_its_end(self, key, seconds=1.0):
    note(self, key, "begins")
    time.sleep(seconds)
    note(self, key, "ends")
    return "done"


@app.task(
    base=AdvisoryTask, bind=True, lock_key="{key}", lock_on_lost="warn", lock_side_effect=Skip("skipped")
)
def is_only_warned(self, key, seconds=1.0):
    note(self, key, "begins")
    time.sleep(seconds)
    note(self, key, "ends")
    return "done"


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_side_effect=Retry(countdown=0.1, maximum=0.2),
    autoretry_for=(LockLost,),
    retry_backoff=False,
    default_retry_delay=0,
)
def tries_again(self, key):
    note(self, key, "begins")
    if self.request.retries == 0:
        time.sleep(20)
    return self.request.retries


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_on_lost="fail")
def asks_for_another_run_and_fails(self, key):
    note(self, key, "begins")
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        time.sleep(0.5)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def fails_by_itself(self, key, seconds=0.5):
    note(self, key, "begins")
    try:
        time.sleep(seconds)
    except LockLost:
        raise ValueError("its own") from None


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def swallows_everything(self, key):
    note(self, key, "begins")
    seen = 0
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        try:
            time.sleep(0.3)
        except LockLost:  # noqa: PERF203 - what it is about
            seen += 1
    return seen


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=20)
def nests(self, key, inner):
    """Waits for an inner lock while it holds the outer one."""
    note(self, key, "begins")
    with advisory(inner):
        return "done"


@app.task(bind=True)
def sleeps_without_a_lock(self, seconds):
    time.sleep(seconds)
    return "done"
