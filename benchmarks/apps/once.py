"""The task that celery-once keeps from being queued twice."""

from __future__ import annotations

import os

from celery_once import QueueOnce

from benchmarks.celery_app import made

app = made("once")
app.conf.ONCE = {
    "backend": "celery_once.backends.Redis",
    "settings": {"url": os.environ["REDIS_URL"], "default_timeout": 60},
}


@app.task(base=QueueOnce)
def task(number: int) -> None:
    pass
