"""Who waits for a lock, and behind whom, by their pids alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from django.db import connections

from celery_pglock.looks import no_views

Pid: TypeAlias = int | None
"""``None`` stands for all transactions that were prepared: they have no backend."""

# pg_locks is not read: that stops all who take locks, for longer the more there are. Whoever is idle waits
# for none, but to have a statement described: PostgreSQL reports no state for that. What others do may be
# hidden from this role, so that they are asked about, too. The function rather than the view over it, which
# takes longer to plan than to run. Missing views are told although none is read.
BLOCKED = """
SELECT to_regclass('celery_pglock_wait') IS NULL, pid, others
FROM (SELECT) AS always
LEFT JOIN (
    SELECT pid, array_remove(pg_blocking_pids(pid), pg_backend_pid()) AS others
    FROM pg_stat_get_activity(NULL)
    WHERE datid = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND (coalesce(state, '') NOT LIKE 'idle%%' OR wait_event_type = 'Lock')
    OFFSET 0
) AS active ON cardinality(others) > 0
"""


def blocked(alias: str) -> dict[int, tuple[Pid, ...]]:
    """Who is in the way of each backend that waits, but whoever asks; call it while ``looking``.

    ``LockMisuse`` where the views are missing.
    """
    with connections[alias].cursor() as cursor:
        cursor.execute(BLOCKED, [])
        rows = cursor.fetchall()
    if rows[0][0]:
        raise no_views(alias)
    return {pid: in_the_way(others) for _, pid, others in rows if pid is not None}


def in_the_way(blockers: Iterable[int]) -> tuple[Pid, ...]:
    """What ``pg_blocking_pids`` gives, each once; 0 is a transaction that was prepared."""
    return tuple(pid or None for pid in sorted(set(blockers)))
