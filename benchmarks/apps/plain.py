"""The task without a lock."""

from __future__ import annotations

from benchmarks.celery_app import made

app = made("plain")


@app.task
def task(number: int) -> None:
    pass
