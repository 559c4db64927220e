"""The markers by which backends tell that they run critical tasks."""

from __future__ import annotations

import hashlib
from typing import Final

from celery_pglock.keys import Key, key

# The first half of a pair of int4; the second is the task's priority. Like an advisory lock of anybody's a
# marker is visible to every role, and ends with its session.
CRITICAL: Final = int.from_bytes(
    hashlib.sha256(b"celery_pglock:critical").digest()[:4], "little", signed=True
)

# Shared, so that any number of backends have the same one, and never waited for.
TAKE: Final = "pg_try_advisory_lock_shared(%s::int, %s::int)"
GIVE_BACK: Final = "pg_advisory_unlock_shared(%s::int, %s::int)"


def marker(priority: int) -> Key:
    """The marker of tasks with this priority, which is 1 or more."""
    return key((CRITICAL, priority))


def columns() -> dict[str, int]:
    """The columns of ``pg_locks`` by which markers are known, whatever the priority."""
    one = marker(1)
    return {"classid": one.classid, "objsubid": one.objsubid}
