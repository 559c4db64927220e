"""The task with django-pglock's lock in its body."""

from __future__ import annotations

from benchmarks.celery_app import made

app = made("django_pglock")

import pglock  # noqa: E402 - its models want Django set up


@app.task
def task(number: int) -> None:
    with pglock.advisory(f"task:{number}"):
        pass
