"""What it costs to take a lock that is free, and to give it back."""

from __future__ import annotations

from benchmarks.contenders import contending, variables_of
from benchmarks.rounds import interleaved
from benchmarks.tables import Scale, Table

FLOOR = "floor: SELECT 1"
TARGETS = {FLOOR: "benchmarks.lock_contenders:floor", "ours": "benchmarks.lock_contenders:session"}


def measure(scale: Scale) -> list[Table]:
    with contending(TARGETS, variables_of(scale)) as contenders:
        found = interleaved(contenders, rounds=scale.choose(full=31, quick=7), seconds=0.05)
    rows = [(name, found.seconds(name).median * 1e6, found.ratio(name, FLOOR).median) for name in found.means]
    return [Table(name="locks", title="A free lock", columns=("what", "µs", "floors"), rows=rows)]
