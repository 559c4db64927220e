"""What processor time a process uses for locks while it does nothing with them."""

from __future__ import annotations

import threading
import time

from benchmarks.processes import processes, processor_seconds
from benchmarks.tables import Scale, Table, Target

# In seconds: how long an idle session may be kept, and some.
LONGEST_IDLE = 12.0

Use = tuple[float, float, int]
"""Seconds that went by, those of a processor that were used, and threads more than before."""


def measure(scale: Scale) -> list[Table]:
    seconds = scale.choose(full=60.0, quick=3.0)
    kinds = {"nothing, but a lock was held once": idle, "one lock": hold}
    if scale.is_quick:
        del kinds["nothing, but a lock was held once"]
    with processes(len(kinds), scale.database_url) as executor:
        futures = {what: executor.submit(kind, seconds) for what, kind in kinds.items()}
        uses = {what: future.result() for what, future in futures.items()}
    # That the process wakes up to look at its own clock counts, too.
    bounds = {"one lock": 0.1, "nothing, but a lock was held once": 0.001}
    return [
        Table(
            name="lease",
            title="A process that holds",
            columns=("what", "seconds", "processor, ms", "of a core, %", "threads more"),
            rows=[
                (what, past, used * 1e3, 100 * used / past, more) for what, (past, used, more) in uses.items()
            ],
            note="With the default lease of 30 s.",
            targets=[
                Target(f"processor time: {what}", 100 * used / past, bounds[what], "% of a core")
                for what, (past, used, _) in uses.items()
            ],
        )
    ]


def idle(seconds: float) -> Use:
    """A lock was held; its session has been closed since, and its watcher has ended."""
    from celery_pglock import advisory, tasks  # noqa: F401 - a worker has imported everything

    before = threading.active_count()
    with advisory("idle"):
        pass
    give_up = time.monotonic() + LONGEST_IDLE
    while threading.active_count() > before and time.monotonic() < give_up:
        time.sleep(0.1)
    return _use(seconds, before)


def hold(seconds: float) -> Use:
    """A lock is held meanwhile."""
    from celery_pglock import advisory

    before = threading.active_count()
    with advisory("held"):
        return _use(seconds, before)


def _use(seconds: float, threads: int) -> Use:
    began, before = time.monotonic(), processor_seconds()
    time.sleep(seconds)
    return time.monotonic() - began, processor_seconds() - before, threading.active_count() - threads
