"""The task with redis-py's Lock in its body."""

from __future__ import annotations

import os

import redis

from benchmarks.celery_app import made

app = made("redis_lock")
client = redis.from_url(os.environ["REDIS_URL"])


@app.task
def task(number: int) -> None:
    with client.lock(f"task:{number}", timeout=60):
        pass
