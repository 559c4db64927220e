"""What can go wrong with a lock.

::

    Exception
    └── LockError
        ├── LockNotAcquired  also django.db.utils.OperationalError
        ├── LockLost
        ├── Preempted
        ├── LockNotHeld      also RuntimeError
        └── LockMisuse       also ValueError, RuntimeError

Every error keeps plain values in ``args``, so it survives pickle and JSON: a result backend
rebuilds it by calling the class with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from django.db.utils import OperationalError


class LockError(Exception):
    """The root of every error that this package raises of its own."""

    def __repr__(self) -> str:
        # Celery logs an error by its repr.
        return f"{type(self).__name__}({str(self)!r})"


class LockNotAcquired(LockError, OperationalError):
    """The lock is held by somebody else, and waiting for it ended or was not asked for.

    ``lock`` is the lock's name, ``reason`` what PostgreSQL answered, ``waited`` the seconds spent
    (0 where waiting was not asked for), ``holders`` one line for each holder that could still be seen.
    """

    def __init__(
        self, lock: str, reason: str = "it is taken", waited: float = 0.0, holders: Sequence[str] = ()
    ) -> None:
        super().__init__(lock, reason, waited, list(holders))
        self.lock = lock
        self.reason = reason
        self.waited = waited
        self.holders: tuple[str, ...] = tuple(holders)

    def __str__(self) -> str:
        waiting = f"after waiting {self.waited:.2f} s" if self.waited >= 0.01 else "without waiting"
        held_by = f"; held by {', '.join(self.holders)}" if self.holders else ""
        return f"lock {self.lock!r} was not acquired {waiting}: {self.reason}{held_by}"


class LockLost(LockError):
    """The database session that kept the lock ended, or no longer had it, before the work was done."""

    def __init__(self, lock: str, reason: str = "its database session ended") -> None:
        super().__init__(lock, reason)
        self.lock = lock
        self.reason = reason

    def __str__(self) -> str:
        return f"lock {self.lock!r} was lost while it was needed: {self.reason}"


class Preempted(LockError):
    """The task was stopped, because a critical one could not get through.

    ``lock`` is the name of its own lock, ``by`` who stopped it, ``reason`` for whom.
    """

    def __init__(self, lock: str, by: str = "", reason: str = "") -> None:
        super().__init__(lock, by, reason)
        self.lock = lock
        self.by = by
        self.reason = reason

    def __str__(self) -> str:
        return f"stopped under lock {self.lock!r} by {self.by or 'somebody'}: {self.reason}"


class LockNotHeld(LockError, RuntimeError):
    """A release of a lock that this thread does not hold."""

    def __init__(self, lock: str) -> None:
        super().__init__(lock)
        self.lock = lock

    def __str__(self) -> str:
        return f"lock {self.lock!r} is not held by this thread, so it cannot be released"


class LockMisuse(LockError, ValueError, RuntimeError):
    """A lock, an option or a setting that cannot work as written; the message says what would."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A guess at what a misspelt name was meant to be, ready to end a sentence; empty if there is none."""
    guesses = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {guesses[0]!r}?" if guesses else ""
