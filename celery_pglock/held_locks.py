"""What a body may ask of the lock under which it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from django.db import connections
from django.db.models import Model, QuerySet

from celery_pglock.claims import Hold
from celery_pglock.errors import LockLost, LockMisuse
from celery_pglock.fences import IsNewest, Token
from celery_pglock.interruptions import Interruption

M = TypeVar("M", bound=Model)

# What stands for a token where locks are turned off: lower than every real one.
NO_TOKEN = Token(0, 0)


@dataclass(frozen=True, slots=True)
class HeldLock:
    """The lock of a task that runs now: ``self.lock`` in its body."""

    _hold: Hold
    _is_strict: bool
    _interruption: Interruption

    @property
    def name(self) -> str:
        return self._hold.name

    def check(self) -> None:
        """Raise ``LockLost`` if the lock is gone; asks nobody, so it costs next to nothing."""
        try:
            self._hold.check()
        except LockLost:
            self._interruption.was_made()
            raise

    @property
    def token(self) -> Token:
        """The fencing token ``(timeline, number)``: every later holder of its keys has a higher one.

        Raises ``LockMisuse`` without ``lock_strict``.
        """
        if not self._is_strict:
            raise LockMisuse(f"Lock {self.name!r} has no fencing token: its task needs lock_strict=True.")
        return max(self._hold.tokens.values(), default=NO_TOKEN)

    def guard(self, queryset: QuerySet[M]) -> QuerySet[M]:
        """The queryset, empty unless this lock's token is still the newest of its keys.

        ``guard(queryset).update(...)`` writes nothing once somebody else has the lock: 0 rows. What takes
        several statements, as ``delete()`` and ``save()`` may, belongs into a transaction with the guarded
        query: nobody gets the lock before its end. The table has to be in the lock's database.
        """
        if self.token == NO_TOKEN:
            return queryset
        databases = [connections[alias].settings_dict["NAME"] for alias in (queryset.db, self._hold.using)]
        if len(set(databases)) > 1:
            raise LockMisuse(
                f"Lock {self.name!r} is kept on the alias {self._hold.using!r}, in another database than "
                f"{queryset.db!r}, and its token guards only what is there: set lock_using or using()."
            )
        return queryset.filter(IsNewest(self._hold.tokens))

    def __str__(self) -> str:
        return self.name


class _Bodies(threading.local):
    """The bodies that run in this thread, innermost last, each with its lock."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, HeldLock]] = []


_bodies = _Bodies()


@contextmanager
def body_of(task_name: str, lock: HeldLock) -> Iterator[None]:
    """While the block runs, the lock can be asked for."""
    before = len(_bodies.stack)
    try:
        _bodies.stack.append((task_name, lock))
        yield
    finally:
        del _bodies.stack[before:]


def lock_of(task_name: str) -> HeldLock:
    """The lock under which a body of this task runs in this thread."""
    for name, lock in reversed(_bodies.stack):
        if name == task_name:
            return lock
    raise LockMisuse(f"No body of {task_name} runs under a lock here: self.lock is for the body alone.")
