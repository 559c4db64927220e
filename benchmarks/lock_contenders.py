"""The locks that are compared: each is a function that gives what does it so many times."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Run = Callable[[int], object]


def _cursor() -> Any:
    import psycopg

    connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    # As soon as a statement is prepared it stays so: what is measured is the second time and all that follow.
    connection.prepare_threshold = 0
    return connection.cursor()


def floor() -> Run:
    cursor = _cursor()

    def run(times: int) -> None:
        for _ in range(times):
            cursor.execute("SELECT 1").fetchone()

    return run


def session() -> Run:
    from benchmarks import django_settings

    django_settings.set_up()
    from celery_pglock import advisory

    lock = advisory("k")

    def run(times: int) -> None:
        for _ in range(times):
            with lock:
                pass

    return run
