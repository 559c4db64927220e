"""What it costs to look at the locks, those who ask and those who lock meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psycopg

from benchmarks import servers
from benchmarks.processes import START_SECONDS, processes, quantile, wait_for
from benchmarks.rounds import Quartiles, Rounds, interleaved
from benchmarks.tables import Bars, Scale, Table, Target

HOLDERS = 100
WAITERS = 50

# Room for 50,000 locks.
SETTINGS = {"max_connections": "400", "max_locks_per_transaction": "256"}

FLOOR = "floor: SELECT 1"
PIDS = "who is blocked by whom, by pids"
WAITS = "BlockedPGLock.objects.all()"
NOBODY = "nobody"
WAYS = (NOBODY, PIDS, WAITS)

# In seconds: how often somebody looks, for how long at a time, and how long locks of others rest meanwhile.
LOOK_EVERY = 1.0
SLICE = 2.0
REST = 0.001

Questions = Mapping[str, Callable[[], object]]


def measure(scale: Scale) -> list[Table]:
    numbers = scale.choose(full=(1_000, 10_000, 50_000), quick=(10_000,))
    rounds, slices = scale.choose(full=(15, 8), quick=(2, 1))
    with servers.postgresql(scale.postgresql, **SETTINGS) as url, processes(2, url) as executor:
        executor.submit(migrate).result()
        found = {}
        for number in numbers:
            with _crowd(url, number, WAITERS):
                found[f"{number:,} locks, ms"] = executor.submit(ask, rounds).result()
                if number == numbers[-1]:
                    # In turns, because the machine may be busier later.
                    turns = [{way: _meanwhile(executor, way) for way in WAYS} for _ in range(slices)]
        with _crowd(url, numbers[-1], 0):
            found[f"{numbers[-1]:,}, nobody waits, ms"] = executor.submit(ask, rounds).result()
    return [_costs(found, numbers[-1]), _effects(turns, numbers[-1])]


def _costs(found: Mapping[str, Rounds], most: int) -> Table:
    columns = list(found)
    asked = found[columns[-2]]
    rows = [
        (words, *(found[column].seconds(words).median * 1e3 for column in columns)) for words in asked.means
    ]
    return Table(
        name="looking",
        title=f"Looking at the locks of {HOLDERS} holders and {WAITERS} waiters",
        columns=("question", *columns),
        rows=rows,
        note=(
            "The question by pids is one statement. `pids()` asks it within timeouts of its own, which takes "
            "a transaction. Where somebody waits, the others read `pg_locks` in full, once or twice."
        ),
        targets=[Target(f"{PIDS}, {most:,} locks", asked.seconds(PIDS).median * 1e3, 1.0, "ms")],
        chart=Bars((columns[-2],)),
    )


def _effects(turns: Sequence[Mapping[str, list[float]]], locks: int) -> Table:
    def ratio(way: str, part: float) -> float:
        ratios = [quantile(turn[way], part) / quantile(turn[NOBODY], part) for turn in turns]
        return Quartiles.of(ratios).median

    rows = []
    for way in WAYS:
        took = sorted(one for turn in turns for one in turn[way])
        p50, p99 = (quantile(took, part) * 1e3 for part in (0.5, 0.99))
        rows.append((way, p50, ratio(way, 0.5), p99, ratio(way, 0.99), took[-1] * 1e3))
    return Table(
        name="looked-at",
        title=f"Locks of others while somebody looks every {LOOK_EVERY:g} s, at {locks:,} locks",
        columns=("who looks", "p50, ms", "ratio", "p99, ms", "ratio of p99", "longest, ms"),
        rows=rows,
        note="A read of `pg_locks` stops all who take locks while it copies them: see the longest.",
        targets=[Target(f"lock of others while {PIDS} is asked, p50", ratio(PIDS, 0.5), 1.1, "times")],
    )


def migrate() -> None:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def ask(rounds: int) -> Rounds:
    """Each question in turns."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        contenders = {
            words: partial(_seconds, question) for words, question in _questions(connection).items()
        }
        return interleaved(contenders, rounds=rounds, operations=1)


def _seconds(question: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        question()
    return time.perf_counter() - began


def _questions(connection: psycopg.Connection[Any]) -> Questions:
    from celery_pglock import advisory, inquiries, obstructions
    from celery_pglock.models import BlockedPGLock, PGLock
    from celery_pglock.waiters import BLOCKED

    def statement(sql: str) -> Callable[[], object]:
        return lambda: connection.execute(sql, prepare=True).fetchall()

    everything = inquiries.asked(None, dict.fromkeys(inquiries.Chosen.__dataclass_fields__))
    return {
        FLOOR: statement("SELECT 1"),
        PIDS: statement(BLOCKED.replace("%%", "%")),
        "BlockedPGLock.objects.pids()": BlockedPGLock.objects.pids,
        WAITS: lambda: list(BlockedPGLock.objects.all()),
        "pglock --tree": lambda: inquiries.forest(everything),
        "prioritize_critical_tasks": lambda: obstructions.look("default", 0),
        "advisory(…).explain()": advisory(7).explain,
        "PGLock.objects.filter(name=…)": lambda: list(PGLock.objects.filter(name="7")),
        "a read of pg_locks": statement("SELECT count(*) FROM pg_locks"),
    }


def look(start: float, way: str) -> None:
    """Ask the same time and again."""
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        question = _questions(connection)[way]
        moment = start
        while moment < start + SLICE:
            wait_for(moment)
            question()
            moment += LOOK_EVERY


def _meanwhile(executor: Executor, way: str) -> list[float]:
    """How long locks of others take meanwhile, longest last."""
    start = time.monotonic() + START_SECONDS
    looks = executor.submit(look, start, way) if way != NOBODY else None
    took: list[float] = executor.submit(take_others, start).result()
    if looks:
        looks.result()
    return sorted(took)


def take_others(start: float) -> list[float]:
    """How many seconds it took each time to take and give back a lock that nobody else wants."""
    took = []
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        wait_for(start)
        while (began := time.monotonic()) < start + SLICE:
            connection.execute("SELECT pg_advisory_lock(-1)", prepare=True)
            connection.execute("SELECT pg_advisory_unlock(-1)", prepare=True)
            took.append(time.monotonic() - began)
            time.sleep(REST)
    return took


@contextmanager
def _crowd(url: str, locks: int, waiters: int) -> Iterator[None]:
    """So many locks of all holders together, and sessions of which each waits for one of them."""
    each = locks // HOLDERS
    with ExitStack() as people:

        def join() -> psycopg.Connection[Any]:
            return people.enter_context(psycopg.connect(url, autocommit=True))

        for holder in range(HOLDERS):
            numbers = f"generate_series({holder * each + 1}, {(holder + 1) * each})"
            join().execute(f"SELECT count(pg_advisory_lock(number)) FROM {numbers} AS number")
        waiting = [join() for _ in range(waiters)]
        for number, one in enumerate(waiting):
            one.pgconn.send_query(f"SELECT pg_advisory_lock({number * each + 1})".encode())
        _wait_for_waiters(join(), waiters)
        yield
        # What waits must not wait for its own farewell.
        for one in waiting:
            one.pgconn.finish()


def _wait_for_waiters(connection: psycopg.Connection[Any], number: int) -> None:
    sql = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    while connection.execute(sql).fetchone() != (number,):
        time.sleep(0.02)
