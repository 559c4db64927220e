"""What a process keeps of the locks that it gave back."""

from __future__ import annotations

import gc
import os
import sys

from benchmarks.processes import processes
from benchmarks.tables import Scale, Table, Target

# Acquisitions before, so that all is there that comes once.
FIRST = 10_000
MOST_MEGABYTES = 1.0

Size = tuple[float, int]
"""Megabytes of memory that the process has, and blocks that Python has given out."""


def measure(scale: Scale) -> list[Table]:
    first, times, keys = scale.choose(full=(FIRST, 1_000_000, 100_000), quick=(1_000, 10_000, 5_000))
    with processes(1, scale.database_url) as executor:
        before = executor.submit(acquire, first, first).result()
        after = executor.submit(acquire, times, keys).result()
    rows = [
        (f"{first:,} of {first:,} keys", *before),
        (f"and {times:,} of {keys:,} keys", *after),
    ]
    return [
        Table(
            name="memory",
            title="Memory of a process",
            columns=("acquisitions", "megabytes", "blocks of Python's"),
            rows=rows,
            targets=[
                Target(f"growth by {times:,} acquisitions", after[0] - before[0], MOST_MEGABYTES, "MB"),
                Target(f"blocks kept of {keys:,} keys", after[1] - before[1], keys / 100, "blocks"),
            ],
        )
    ]


def acquire(times: int, keys: int) -> Size:
    """Take a lock and give it back so often, of so many keys in turn."""
    from celery_pglock import advisory

    for number in range(times):
        with advisory(f"memory:{number % keys}"):
            pass
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, sys.getallocatedblocks()
