"""Tasks of a worker whose PostgreSQL comes and goes; they write into a file, as no table can be relied on."""

import os
import time

from celery_pglock import AdvisoryTask, Raise, Skip, XactAdvisoryTask
from tests.celery_app import app


def note(task):
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(f"{task.request.id} {time.time()}\n")


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def skips_in_outages(self, key):
    note(self)
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Raise(), max_retries=0)
def raises_in_outages(self, key):
    note(self)
    return "done"


@app.task(base=XactAdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def in_transaction_in_outages(self, key):
    note(self)
    return "done"


@app.task(
    base=XactAdvisoryTask, bind=True, lock_key="{key}", lock_timeout=20, lock_side_effect=Skip("skipped")
)
def waits_in_transaction_in_outages(self, key):
    note(self)
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_strict=True, lock_side_effect=Skip("skipped"))
def strict_in_outages(self, key):
    note(self)
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"))
def tells_headers_in_outages(self, key):
    if self.request.retries == 0:
        raise self.retry(countdown=0, max_retries=1)
    return [self.request.retries, (self.request.headers or {}).get("pglock_outages")]
