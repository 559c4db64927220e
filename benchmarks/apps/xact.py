"""The task with a transaction-level lock of ours."""

from __future__ import annotations

from benchmarks.celery_app import made
from celery_pglock import XactAdvisoryTask

app = made("xact")


@app.task(base=XactAdvisoryTask, lock_by=("number",))
def task(number: int) -> None:
    pass
