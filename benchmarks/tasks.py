"""What a lock adds to a task."""

from __future__ import annotations

from benchmarks.tables import Scale, Table


def measure(scale: Scale) -> list[Table]:
    return []
