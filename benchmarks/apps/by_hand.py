"""The task that takes a lock by hand: two prepared statements, on a connection that each process keeps."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import psycopg

from benchmarks.celery_app import made

app = made("by_hand")


@cache
def cursor() -> psycopg.Cursor[Any]:
    connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, prepare_threshold=0)
    return connection.cursor()


@app.task
def task(number: int) -> None:
    cursor().execute("SELECT pg_advisory_lock(%s)", [number]).fetchone()
    cursor().execute("SELECT pg_advisory_unlock(%s)", [number]).fetchone()
