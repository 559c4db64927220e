"""What a body may ask of the lock under which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from django.db.models import Model, QuerySet

from celery_pglock.claims import Hold
from celery_pglock.errors import LockMisuse
from celery_pglock.fences import IsNewest, Token

M = TypeVar("M", bound=Model)

# What stands for a token where locks are turned off: lower than every real one.
NO_TOKEN = Token(0, 0)


@dataclass(frozen=True, slots=True)
class HeldLock:
    """The lock of a task that runs now: ``self.lock`` in its body."""

    _hold: Hold
    _is_strict: bool

    @property
    def name(self) -> str:
        return self._hold.name

    def check(self) -> None:
        """Raise ``LockLost`` if the lock is gone; asks nobody, so it costs next to nothing."""
        self._hold.check()

    @property
    def token(self) -> Token:
        """The fencing token ``(timeline, number)``: every later holder of the key has a higher one.

        Raises ``LockMisuse`` without ``lock_strict``.
        """
        if not self._is_strict:
            raise LockMisuse(f"Lock {self.name!r} has no fencing token: its task needs lock_strict=True.")
        return self._hold.token or NO_TOKEN

    def guard(self, queryset: QuerySet[M]) -> QuerySet[M]:
        """The queryset, empty unless this lock's token is still the newest of its keys.

        ``guard(queryset).update(...)`` writes nothing once somebody else has the lock: 0 rows. Inside of a
        transaction nobody gets the lock before its end. The table has to be in the lock's database.
        """
        token = self.token
        return queryset if token == NO_TOKEN else queryset.filter(IsNewest(self._hold.keys, token))

    def __str__(self) -> str:
        return self.name
