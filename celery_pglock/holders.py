"""Who holds a key, and who waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from django.db import connections
from django.utils.asyncio import async_unsafe

from celery_pglock import labels
from celery_pglock.errors import LockMisuse
from celery_pglock.keys import Key
from celery_pglock.labels import Owner
from celery_pglock.pool import pool
from celery_pglock.wordings import PREPARED

# Advisory locks are per database. The oid comes from pg_stat_activity, so that no lock is waited for.
LOCKS_ON_KEYS = """
SELECT l.pid, l.mode, l.granted, l.objsubid, l.classid::bigint, l.objid::bigint,
       coalesce(a.application_name, ''), coalesce(a.query, ''), coalesce(l.waitstart, a.xact_start),
       CASE WHEN a.state <> 'active' THEN a.state_change END
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'advisory'
  AND l.database = (SELECT datid FROM pg_stat_activity WHERE pid = pg_backend_pid())
  AND (l.objsubid, l.classid::bigint, l.objid::bigint) IN (
      SELECT * FROM unnest(%s::int[], %s::bigint[], %s::bigint[])
  )
ORDER BY l.granted DESC, l.waitstart, l.pid
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """One backend that holds a key or waits for it; ``pid`` is ``None`` for a transaction that was prepared.

    ``pid`` is the backend's, ``granted`` whether it holds the key; ``task_name``, ``task_id`` and ``worker``
    are of the task that it works for. ``since`` is when it began to wait, or got what it holds; that may be
    by its own host's clock. It is ``None`` where it cannot be known. Names are what the backend says of
    itself, and empty where it may not be read.
    """

    pid: int | None
    key: str
    shared: bool
    granted: bool
    since: datetime | None
    task_name: str
    task_id: str
    worker: str

    def as_dict(self) -> dict[str, Any]:
        """Who it is and since when, of values that JSON knows."""
        return {
            "task_name": self.task_name,
            "task_id": self.task_id,
            "worker": self.worker,
            "backend_pid": self.pid,
            "since": self.since and self.since.isoformat(),
        }

    def __str__(self) -> str:
        if self.pid is None:
            return PREPARED
        words = [self.task_name or ("task" if self.task_id else "a session that is no task")]
        if self.task_id:
            words.append(f"[{self.task_id}]")
        if self.worker:
            words.append(f"on {self.worker}")
        words.append(f"(backend {self.pid}{', shared' if self.shared else ''}")
        words[-1] += f", since {self.since:%Y-%m-%d %H:%M:%S %Z})" if self.since else ")"
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a lock could be taken at the moment of looking, and who stood in the way.

    ``lock`` is its name, ``would_run`` whether it could be taken; ``holders`` and ``waiters`` are tuples of
    ``Holder``. As text it is a line for the lock, and one for each of them.
    """

    lock: str
    would_run: bool
    holders: tuple[Holder, ...]
    waiters: tuple[Holder, ...]

    def __str__(self) -> str:
        lines = [f"lock {self.lock!r}: {'free to take' if self.would_run else 'taken'}"]
        lines += [f"  held by {holder}" for holder in self.holders]
        lines += [f"  waited for by {waiter}" for waiter in self.waiters]
        return "\n".join(lines)


def explanation(
    lock: str, slots_by_key: Sequence[Sequence[Key]], found: Sequence[Holder], *, shared: bool
) -> Explanation:
    """What was found, judged for somebody who wants one slot of every key in this mode."""
    # A waiting exclusive lock holds off new shared ones: PostgreSQL queues them behind it.
    in_the_way = {one.key for one in found if (not one.shared if shared else one.granted)}
    return Explanation(
        lock,
        would_run=all(any(slot.name not in in_the_way for slot in slots) for slots in slots_by_key),
        holders=tuple(one for one in found if one.granted),
        waiters=tuple(one for one in found if not one.granted),
    )


@async_unsafe("A lock session belongs to a thread, which coroutines share: ask inside of sync_to_async().")
def find(keys: Sequence[Key], using: str, *, xact: bool) -> tuple[Holder, ...]:
    """Everybody who holds one of the keys or waits for it: holders first, then waiters in their order.

    Asked on a lock session; where a pooler allows none, those who lock in transactions ask in theirs.
    """
    numbers = [[key.objsubid for key in keys], [key.classid for key in keys], [key.objid for key in keys]]
    try:
        rows = _rows_in_session(using, numbers)
    except LockMisuse:
        if not xact:
            raise
        rows = _rows_in_transaction(using, numbers)
    return tuple(_holder(row, keys) for row in rows)


def _rows_in_session(using: str, numbers: Sequence[list[int]]) -> list[tuple[Any, ...]]:
    session = pool().lease(using, Owner())
    try:
        return session.rows(LOCKS_ON_KEYS, numbers)
    finally:
        pool().give_back(session)


def _rows_in_transaction(using: str, numbers: Sequence[list[int]]) -> list[tuple[Any, ...]]:
    with connections[using].cursor() as cursor:
        cursor.execute(LOCKS_ON_KEYS, numbers)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    return rows


def _holder(row: Sequence[Any], keys: Iterable[Key]) -> Holder:
    pid, mode, granted, objsubid, classid, objid, application_name, query, since, ended = row
    asked = next(key for key in keys if (key.objsubid, key.classid, key.objid) == (objsubid, classid, objid))
    label = labels.read(query)
    owner = label.owner if label else Owner()
    if granted and label and label.holdings:
        stamps = {holding.key: holding.since for holding in label.holdings}
        # Of many slots a label does not name each.
        unnamed = None if None in stamps.values() else max(filter(None, stamps.values()))
        stamp = stamps.get(asked, unnamed)
        since = ended if stamp is None else datetime.fromtimestamp(stamp, timezone.utc)
    return Holder(
        pid=pid,
        key=asked.name,
        shared=mode == "ShareLock",
        granted=granted,
        since=since,
        task_name=owner.task_name,
        task_id=owner.task_id or labels.task_id_of(application_name),
        worker=owner.worker,
    )
