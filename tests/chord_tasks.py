"""Tasks that meet a lock that is taken in the middle of a canvas."""

from celery.exceptions import Ignore, Reject

from celery_pglock import AdvisoryTask, SideEffect, Skip
from tests.celery_app import app


class Raises(SideEffect):
    def __init__(self, error):
        self.error = error

    def on_conflict(self, conflict):
        raise self.error


class Replaces(SideEffect):
    def on_conflict(self, conflict):
        return conflict.task.replace(gives.s("replaced"))


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=Skip())
def skipped_with_none(key):
    return "done"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=Skip())
def skipped_in_a_chain(key):
    return "done"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=Skip("skipped"))
def skipped_with_result(key):
    return "done"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=Raises(Ignore()))
def ignored(key):
    return "done"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=Raises(Reject("no")))
def rejected(key):
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Replaces())
def replaced(self, key):
    return "done"


@app.task
def gives(value):
    return value


@app.task
def collects(results):
    return results
