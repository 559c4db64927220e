"""What tests of locked tasks need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from celery_pglock.config import current
from celery_pglock.errors import LockNotAcquired
from celery_pglock.keys import Identifier, canonical
from celery_pglock.labels import Owner
from celery_pglock.locks import advisory
from celery_pglock.sessions import LockSession


@contextmanager
def held_elsewhere(
    *keys: Identifier | advisory, shared: bool = False, using: str | None = None
) -> Iterator[None]:
    """Hold the keys on a database session of somebody else's, as another worker would.

    Takes ids, or the locks that ``task.lock_for(...)`` gives. ``using`` is an alias of ``DATABASES``;
    ``CELERY_PGLOCK["USING"]`` if it is not named. Raises ``LockNotAcquired`` if one is taken already.
    """
    wanted = sorted(
        {key for one in keys for key in (one.keys if isinstance(one, advisory) else canonical([one]))}
    )
    session = LockSession(using or current().USING, Owner(worker="held_elsewhere"))
    try:
        if not session.take(wanted, shared=shared, timeout=0):
            raise LockNotAcquired(", ".join(key.name for key in wanted))
        try:
            yield
        finally:
            session.give_back(wanted, shared=shared)
    finally:
        session.close()
