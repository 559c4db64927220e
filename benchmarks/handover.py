"""How soon the next one has a lock that was given back, and whether all have their turns."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from benchmarks.processes import at_once, processes, quantile, wait_for
from benchmarks.tables import Scale, Table, Target

# In seconds: long enough for whoever gave the lock back to stand in the queue again.
HELD = 0.001
LONGEST_WAIT = 30.0

Turn = tuple[float, float]
"""When the lock was had, and when it was about to be given back."""


def measure(scale: Scale) -> list[Table]:
    number, seconds = scale.choose(full=(8, 20.0), quick=(4, 1.0))
    rows, targets = [], []
    with processes(number, scale.database_url) as executor:
        for words, way in (
            ("by hand", "by_hand"),
            ("ours, with a timeout", "bounded"),
            ("ours", "unbounded"),
        ):
            turns = [one.result() for one in at_once(executor, number, take_turns, seconds, way)]
            gaps = sorted(_gaps(turns))
            p99, fairness = quantile(gaps, 0.99) * 1e3, _jain([len(one) for one in turns])
            rows.append((words, len(gaps), quantile(gaps, 0.5) * 1e3, p99, fairness))
            if way != "by_hand":
                targets.append(Target(f"hand-over, {words}: p99", p99, 1.0, "ms"))
                targets.append(Target(f"fairness, {words}", fairness, 0.99, at_least=True))
    return [
        Table(
            name="handover",
            title=f"One key, {number} processes that wait for it",
            columns=("waiting", "hand-overs", "p50, ms", "p99, ms", "fairness (Jain)"),
            rows=rows,
            note=(
                f"From just before one process gives the lock back to when the next one has it; each holds "
                f"it for {HELD * 1e3:g} ms, on {os.cpu_count()} processors for all of them and the server."
            ),
            targets=targets,
        )
    ]


def take_turns(start: float, seconds: float, way: str) -> list[Turn]:
    """Take the same lock again and again."""
    turns = []
    with WAYS[way]() as lock:
        wait_for(start)
        while time.monotonic() < start + seconds:
            with lock():
                had = time.monotonic()
                time.sleep(HELD)
                turns.append((had, time.monotonic()))
    return turns


@contextmanager
def _bounded() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    from celery_pglock import Raise, advisory

    yield lambda: advisory("handover", timeout=LONGEST_WAIT, side_effect=Raise)


@contextmanager
def _unbounded() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    from celery_pglock import advisory

    yield lambda: advisory("handover", timeout=None)


@contextmanager
def _by_hand() -> Iterator[Callable[[], AbstractContextManager[object]]]:
    import psycopg

    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:

        @contextmanager
        def lock() -> Iterator[None]:
            connection.execute("SELECT pg_advisory_lock(7)", prepare=True)
            yield
            connection.execute("SELECT pg_advisory_unlock(7)", prepare=True)

        yield lock


WAYS = {"bounded": _bounded, "unbounded": _unbounded, "by_hand": _by_hand}


def _gaps(turns: list[list[Turn]]) -> list[float]:
    in_order = sorted(turn for of_one in turns for turn in of_one)
    return [after[0] - before[1] for before, after in itertools.pairwise(in_order)]


def _jain(counts: list[int]) -> float:
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))
