"""The task with a session-level lock of ours."""

from __future__ import annotations

from benchmarks.celery_app import made
from celery_pglock import AdvisoryTask

app = made("session")


@app.task(base=AdvisoryTask, lock_by=("number",))
def task(number: int) -> None:
    pass
