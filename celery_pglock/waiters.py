"""Who waits for a lock, and behind whom, by their pids alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from django.db import connections

Pid: TypeAlias = int | None
"""``None`` stands for all transactions that were prepared: they have no backend."""

# A view that reads no pg_locks: that stops all who take locks, for longer the more there are.
BLOCKED = """
SELECT pid, array_remove(blockers, pg_backend_pid()) FROM celery_pglock_blocked
WHERE blockers <> ARRAY[pg_backend_pid()]
"""


def blocked(alias: str) -> dict[int, tuple[Pid, ...]]:
    """Who is in the way of each backend that waits, but whoever asks; call it while ``looking``."""
    with connections[alias].cursor() as cursor:
        cursor.execute(BLOCKED)
        return {pid: in_the_way(blockers) for pid, blockers in cursor.fetchall()}


def in_the_way(blockers: Iterable[int]) -> tuple[Pid, ...]:
    """Pids as the view has them, where 0 is a transaction that was prepared."""
    return tuple(pid or None for pid in blockers)
