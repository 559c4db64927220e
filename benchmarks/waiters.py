"""How long those who wait for one key together hold up whoever wants another."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Executor

import psycopg

from benchmarks import servers
from benchmarks.processes import processes, quantile, wait_for
from benchmarks.tables import Lines, Scale, Table, Target

# Threads of few processes, because hundreds of processes would be what is measured.
PROCESSES = 3

# PostgreSQL's own default of deadlock_timeout is a second: then each waiter looks for a deadlock.
WATCHED_FROM = 0.7
WATCHED = 2.0
PAUSE = 0.0005
LONGEST_STALL = 10.0

# What the docs name as the most that do no harm.
CAP = 100

# In seconds: until all have begun, for each to connect, and until they give up after the last look at others.
BEGINNING = 0.5
CONNECTING = 0.012
ENDING = 0.5

KEY = 4711


def measure(scale: Scale) -> list[Table]:
    rounds = scale.choose(full=5, quick=1)
    rows: list[tuple[int, float, float, float]] = []
    with (
        servers.postgresql(scale.postgresql, max_connections="500") as url,
        processes(PROCESSES + 1, url) as executor,
    ):
        for number in scale.choose(full=(0, 50, 100, 200, 350), quick=(50,)):
            probes = [_while_waiting(executor, url, number) for _ in range(rounds)]
            longest = sorted(one[-1] * 1e3 for one in probes)
            p99 = sorted(quantile(one, 0.99) * 1e3 for one in probes)
            rows.append((number, p99[rounds // 2], longest[rounds // 2], longest[-1]))
    most, stall = max((row[0], row[3]) for row in rows if row[0] <= CAP)
    return [
        Table(
            name="waiters",
            title="What waiters for one key do to others",
            columns=("waiters", "p99, ms", "longest, ms", "longest in all rounds, ms"),
            rows=rows,
            note=(
                f"Lock and unlock of a key for which nobody waits, from {WATCHED_FROM:g} to {WATCHED:g} s "
                f"after all began to wait at once: after 1 s each looks for a deadlock, stopping all others."
            ),
            targets=[Target(f"longest stall of others by {most} waiters", stall, LONGEST_STALL, "ms")],
            chart=Lines("waiters", ("longest, ms", "longest in all rounds, ms")),
        )
    ]


def _while_waiting(executor: Executor, url: str, number: int) -> list[float]:
    """How long the locks of somebody else took meanwhile, longest last."""
    shares = [len(range(one, number, PROCESSES)) for one in range(PROCESSES)]
    with psycopg.connect(url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", [KEY])
        start = time.monotonic() + BEGINNING + number * CONNECTING
        crowds = [executor.submit(wait_together, start, share) for share in shares if share]
        found: list[float] = executor.submit(take_others, start).result()
        for crowd in crowds:
            crowd.result()
    return sorted(found)


def wait_together(start: float, number: int) -> None:
    """So many threads with sessions of their own begin to wait at this moment, and give up later."""
    from celery_pglock import advisory

    late: list[float] = []

    def wait(thread: int) -> None:
        with advisory((os.getpid(), thread)):
            connected.wait()
        late.append(time.monotonic() - start)
        wait_for(start)
        with advisory(KEY, timeout=WATCHED + ENDING):
            pass

    connected = threading.Barrier(number)
    threads = [threading.Thread(target=wait, args=[thread]) for thread in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if max(late) > 0:
        raise RuntimeError(f"the last one was connected {max(late):.1f} s too late")


def take_others(start: float) -> list[float]:
    """Take and give back a key for which nobody waits, again and again; how many seconds each time took."""
    took = []
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        # That so many threads begin at once is what this machine does, and not what the server does.
        wait_for(start + WATCHED_FROM)
        while (began := time.monotonic()) < start + WATCHED:
            connection.execute("SELECT pg_advisory_lock(1)", prepare=True)
            connection.execute("SELECT pg_advisory_unlock(1)", prepare=True)
            took.append(time.monotonic() - began)
            time.sleep(PAUSE)
    return took
