"""The task that celery-singleton keeps from being queued twice."""

from __future__ import annotations

import os

from celery_singleton import Singleton

from benchmarks.celery_app import made

app = made("singleton")
app.conf.singleton_backend_url = os.environ["REDIS_URL"]


@app.task(base=Singleton)
def task(number: int) -> None:
    pass
