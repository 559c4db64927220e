"""Tasks for a worker whose role has the rights that SECURITY.md gives it, and no others."""

import time

import celery_pglock.tasks  # noqa: F401 - the tasks for beat
from celery_pglock import AdvisoryTask, Skip, XactAdvisoryTask
from celery_pglock.conflicts import PREEMPTED
from tests.celery_app import app
from tests.models import Entry


def note(task, key):
    Entry.objects.create(key=key, task_id=task.request.id, what="runs")
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def locks(self, key):
    return note(self, key)


@app.task(base=XactAdvisoryTask, bind=True, lock_key="{key}")
def locks_in_transaction(self, key):
    return note(self, key)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_limit=2)
def takes_a_slot(self, key):
    return note(self, key)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_shared=True, lock_timeout=5)
def shares(self, key):
    return note(self, key)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_strict=True)
def locks_strictly(self, key):
    note(self, key)
    mine = Entry.objects.filter(task_id=self.request.id)
    return "done" if self.lock.guard(mine).update(what="guarded") else "stale"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=50, lock_priority=1)
def is_critical(self, key):
    return note(self, key)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=50)
def lingers(self, key):
    """Until it is stopped."""
    note(self, key)
    if PREEMPTED not in (self.request.headers or {}):
        time.sleep(50)
    return "done"
