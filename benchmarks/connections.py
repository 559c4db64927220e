"""How many connections locks open, as the server counts them."""

from __future__ import annotations

import time

import psycopg

from benchmarks.processes import processes
from benchmarks.tables import Scale, Table, Target

SESSIONS = """
SELECT pg_stat_force_next_flush(), sessions FROM pg_stat_database WHERE datname = current_database()
"""

# In seconds: sessions are counted when they tell of themselves, at their end at the latest.
TOLD = 0.5


def measure(scale: Scale) -> list[Table]:
    times = scale.choose(full=10_000, quick=200)
    rows = []
    for what, depth in (("one after the other", 1), ("three in each other", 3)):
        before = _sessions(scale.database_url)
        with processes(1, scale.database_url) as executor:
            executor.submit(nest, times, depth).result()
        time.sleep(TOLD)
        # The one that asks has been counted, too.
        rows.append((what, times * depth, _sessions(scale.database_url) - before - 1))
    return [
        Table(
            name="connections",
            title="Connections of one process",
            columns=("locks", "acquisitions", "connections opened"),
            rows=rows,
            targets=[Target(f"connections for locks {what}", opened, 1) for what, _, opened in rows],
        )
    ]


def nest(times: int, depth: int) -> None:
    """Take locks inside of each other so often."""
    from contextlib import ExitStack

    from celery_pglock import advisory

    for _ in range(times):
        with ExitStack() as locks:
            for level in range(depth):
                locks.enter_context(advisory(f"level {level}"))


def _sessions(url: str) -> int:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(SESSIONS).fetchone()
        assert row
        return int(row[1])
