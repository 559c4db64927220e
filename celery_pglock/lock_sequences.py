"""Advisory locks that are counted, in the order in which they are named."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import ClassVar, TypeVar

from celery_pglock import holders
from celery_pglock.claims import Claim, Hold
from celery_pglock.durations import UNSET
from celery_pglock.errors import LockMisuse, LockNotHeld
from celery_pglock.keys import Identifier, in_order, refuse_too_many
from celery_pglock.side_effects import Conflict

logger = logging.getLogger(__name__)

L = TypeVar("L", bound="LockSequence")


class _Holds(threading.local):
    """What this thread holds, so that a lock value itself stays free of state."""

    def __init__(self) -> None:
        self.stack: list[tuple[LockSequence, Hold]] = []


_holds = _Holds()


def forget_what_was_left() -> None:
    """Forget what this thread holds on sessions that have been closed."""
    _holds.stack[:] = [(lock, hold) for lock, hold in _holds.stack if not hold.is_over]


@dataclass(frozen=True, init=False, repr=False)
class LockSequence:
    """A sequence of advisory locks, which may be empty: use ``ExclusiveLock`` or ``ShareLock``.

    identifiers:
        Texts, ints (int8) or pairs of ints (int4), taken in the order given: who takes the same ones in
        another order can run into a deadlock. One that is named twice is taken once.
    using:
        Alias in ``DATABASES``.

    Like ``threading.RLock`` it is counted, per instance and thread: it is free when it was released as often
    as it was acquired. ``with`` acquires it, waiting, and gives the lock itself. It lives on the lock session
    of the thread; when that is lost ``locked()`` is False from then on, and releasing it is quiet.
    """

    shared: ClassVar[bool]

    identifiers: tuple[Identifier, ...]
    using: str
    _claim: Claim = field(compare=False)

    def __init__(self, *identifiers: Identifier, using: str = "default") -> None:
        if not isinstance(using, str):
            raise LockMisuse(f"using must be an alias in DATABASES, not {using!r}.")
        keys = in_order(identifiers)
        refuse_too_many(keys)
        claim = Claim(keys, shared=self.shared, xact=False, limit=1, using=using, timeout=UNSET)
        object.__setattr__(self, "identifiers", identifiers)
        object.__setattr__(self, "using", using)
        object.__setattr__(self, "_claim", claim)

    def __repr__(self) -> str:
        arguments = [*map(repr, self.identifiers), f"using={self.using!r}"]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT001, FBT002 - as threading.RLock has it
        """Take all of it once more, or without ``blocking`` nothing if it would have to wait.

        Raises ``LockNotAcquired`` when the ``timeout()`` or ``lock_timeout`` in force runs out, or in a
        deadlock.
        """
        for hold in self._held():
            if _is_lost(hold):
                # Nothing could be taken on its session, nor on another one while that is the thread's.
                hold.give_back()
        claim = self._claim if blocking else replace(self._claim, timeout=0.0)
        hold = claim.hold()
        entry = (self, hold)
        try:
            _holds.stack.append(entry)
            taken = claim.take(hold) if claim.keys else hold
            if isinstance(taken, Hold):
                return True
        except BaseException as error:
            # An interruption may come when it has been taken already.
            _holds.stack[:] = [one for one in _holds.stack if one is not entry]
            hold.empty(error)
            raise
        _holds.stack[:] = [one for one in _holds.stack if one is not entry]
        if blocking:
            raise Conflict(self._claim.name, taken.reason, taken.waited, self._holders).error()
        return False

    def release(self) -> None:
        """Give back one acquisition of this thread's; ``LockNotHeld`` if there is none."""
        held = self._held()
        if not held:
            raise LockNotHeld(self._claim.name)
        # What was taken anew after a loss is kept to the last release.
        hold = next(filter(_is_lost, held), held[-1])
        try:
            hold.give_back()
        finally:
            _holds.stack[:] = [one for one in _holds.stack if one[1] is not hold]

    def locked(self) -> bool:
        """Whether this thread holds it through this instance; asks nobody, and knows of a lost session."""
        return any(not _is_lost(hold) for hold in self._held())

    def __enter__(self: L) -> L:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.release()
        except LockNotHeld:
            if error is None:
                raise
            logger.warning("lock %r was released too often before its body failed", self._claim.name)

    def _held(self) -> list[Hold]:
        return [hold for lock, hold in _holds.stack if lock is self]

    def _holders(self) -> tuple[holders.Holder, ...]:
        found = holders.find(self._claim.keys, self.using, xact=False)
        return tuple(holder for holder in found if holder.granted)


class ExclusiveLock(LockSequence):
    """A ``LockSequence`` whose locks nobody else holds at the same time."""

    shared = False


class ShareLock(LockSequence):
    """A ``LockSequence`` that others may share; an ``ExclusiveLock`` keeps it out."""

    shared = True


def _is_lost(hold: Hold) -> bool:
    return hold.session is not None and not hold.session.is_still_there()
