"""Tasks without any lock, to see what Celery alone does."""

from celery import signals
from celery.exceptions import Ignore, Reject

from tests.celery_app import app
from tests.worker_tasks import plain, write

__all__ = ["plain"]


@app.task(bind=True)
def ignores(self):
    write(self, "ignores", "begins")
    raise Ignore


@app.task(bind=True)
def rejects(self):
    write(self, "rejects", "begins")
    raise Reject(requeue=False)


@app.task(bind=True)
def errs(self):
    write(self, "errs", "begins")
    raise ValueError("as asked")


@app.task(bind=True)
def is_refused(self):
    write(self, "is refused", "begins")
    return "the body ran"


@signals.task_prerun.connect(sender=is_refused, weak=False)
def refuse(**_):
    raise Ignore("the lock is taken")
