"""Advisory locks: values that may be built once, shared by threads, taken and asked about."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from django.db import connections

from celery_pglock import holders
from celery_pglock.blocks import refuse_bare, refuse_what_runs_later
from celery_pglock.claims import Claim, Hold, Refusal
from celery_pglock.durations import UNSET, MaybeDuration, seconds
from celery_pglock.errors import LockMisuse, LockNotHeld
from celery_pglock.holders import Explanation, Holder
from celery_pglock.keys import Identifier, canonical, refuse_too_many
from celery_pglock.side_effects import Conflict, Raise, Retry, Return, SideEffect, Skip, side_effect

P = ParamSpec("P")
R = TypeVar("R")


class _Holds(threading.local):
    """What this thread holds, so that a lock value itself stays free of state."""

    def __init__(self) -> None:
        self.by_block: list[tuple[advisory, Hold | None]] = []
        self.by_hand: list[tuple[advisory, Hold | None]] = []


_holds = _Holds()


def _pop(stack: list[tuple[advisory, Hold | None]], lock: advisory) -> Hold | None:
    for position in reversed(range(len(stack))):
        found = stack[position][0]
        if found is lock or found.is_same_lock(lock):
            return stack.pop(position)[1]
    raise LockNotHeld(lock.name)


def forget_what_was_left() -> None:
    """Forget what this thread holds by hand on sessions that have been closed."""
    _holds.by_hand[:] = [(lock, hold) for lock, hold in _holds.by_hand if not (hold and hold.is_over)]


@dataclass(frozen=True, init=False)
class advisory(Claim):  # noqa: N801 - django-pglock's name, used like a function
    """An advisory lock on one or more ids, as a context manager, a decorator or a value.

    ids:
        Texts, ints (int8) or pairs of ints (int4). Several are taken in one canonical order, all or
        nothing. A decorator without one uses ``module.function``.
    shared:
        Shared holders run together, an exclusive one runs alone.
    xact:
        Transaction-level: kept by a transaction on Django's connection of the alias, freed by its COMMIT or
        ROLLBACK. ``with`` and the decorator open a durable one; inside a transaction use ``acquire()``.
    limit:
        How many may hold it at once. Everybody who uses the id must state the same number.
    using:
        Alias in ``DATABASES``.
    timeout:
        Seconds (a number or a timedelta) to wait, over all ids together; ``0`` does not wait, ``None``
        waits for ever, unset keeps the ``lock_timeout`` in force, also that of ``timeout()``. With a limit,
        waiting polls, without order.
    side_effect:
        ``Return`` is the default of the context manager and of ``acquire()``, ``Raise`` of the decorator;
        ``Skip`` is for the decorator.

    Within one thread a session-level lock re-enters. Taken inside of ``atomic`` it is freed before the
    COMMIT. Where its session has ended, leaving it raises ``LockLost``, unless the body itself failed.
    """

    side_effect: SideEffect | None

    def __init__(
        self,
        *ids: Identifier,
        shared: bool = False,
        xact: bool = False,
        limit: int = 1,
        using: str = "default",
        timeout: MaybeDuration = UNSET,
        side_effect: SideEffect | type[SideEffect] | None = None,
    ) -> None:
        refuse_bare(ids, "advisory")
        check_limit(limit, "limit")
        if not isinstance(using, str):
            raise LockMisuse(f"using must be an alias in DATABASES, not {using!r}.")
        keys = canonical(ids)
        refuse_too_many(keys)
        if shared and limit > 1:
            raise LockMisuse("Shared holders are not counted: use shared=True or limit=N, not both.")
        # Frozen for everybody else.
        vars(self).update(
            keys=keys,
            shared=shared,
            xact=xact,
            limit=limit,
            using=using,
            timeout=timeout if timeout is UNSET else seconds(timeout, "timeout"),
            side_effect=None if side_effect is None else _allowed(side_effect),
            strict=False,
        )

    def is_same_lock(self, other: advisory) -> bool:
        """Whether both are the same lock, however long one waits for it, and whatever follows then."""
        mine = (self.keys, self.shared, self.xact, self.limit, self.using)
        return mine == (other.keys, other.shared, other.xact, other.limit, other.using)

    def strictly(self) -> advisory:
        """The same lock, taken with a fencing token and a lock-delay."""
        lock = copy.copy(self)
        object.__setattr__(lock, "strict", True)
        return lock

    def __enter__(self) -> bool:
        acquired = self._obtained(_holds.by_block, open_transaction=True)
        if not acquired:
            _holds.by_block.append((self, None))
        return acquired

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if hold := _pop(_holds.by_block, self):
            hold.leave(error)

    def acquire(self) -> bool:
        """Take the lock until ``release()``, or until the transaction ends; whether it was obtained."""
        if self.xact and not connections[self.using].in_atomic_block:
            raise LockMisuse(
                "acquire() of a transaction-level lock needs an open transaction: call it inside of "
                "transaction.atomic(), or use `with advisory(..., xact=True)`, which opens one."
            )
        return self._obtained([] if self.xact else _holds.by_hand, open_transaction=False)

    def release(self) -> None:
        """Give back what this thread's latest ``acquire()`` of the same lock took."""
        if self.xact:
            raise LockMisuse("A transaction-level lock cannot be released: it ends with its transaction.")
        if hold := _pop(_holds.by_hand, self):
            hold.leave(None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        refuse_what_runs_later(function, "advisory(...)")
        if isinstance(self.side_effect, Return):
            raise LockMisuse("Return is for `with advisory(...)`: a decorated function would run unlocked.")
        effect = self.side_effect or Raise()
        lock = self
        if not self.keys:
            lock = copy.copy(self)
            object.__setattr__(lock, "keys", canonical([f"{function.__module__}.{function.__name__}"]))

        @wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> R:
            hold = lock.hold()
            try:
                taken = lock.take(hold)
            except BaseException as error:
                hold.empty(error)
                raise
            if isinstance(taken, Refusal):
                instead: R = effect.on_conflict(lock._conflict(taken))
                return instead
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                taken.leave(error)
                raise
            taken.leave(None)
            return result

        return locked

    def is_held(self) -> bool:
        """Whether anybody holds one of the keys now."""
        return bool(self.holders())

    def holders(self) -> tuple[Holder, ...]:
        """Who holds the keys now."""
        return self.explain().holders

    def explain(self) -> Explanation:
        """Whether it could be taken now; who holds it, and who waits for it."""
        slots_by_key = [key.slots(self.limit) for key in self.keys]
        found = holders.find([slot for slots in slots_by_key for slot in slots], self.using, xact=self.xact)
        return holders.explanation(self.name, slots_by_key, found, shared=self.shared)

    def _obtained(self, stack: list[tuple[advisory, Hold | None]], *, open_transaction: bool) -> bool:
        """Whether it was taken; its hold is on the stack then."""
        if not self.keys:
            raise LockMisuse("advisory() needs at least one lock id, unless it decorates a function.")
        if isinstance(self.side_effect, Skip):
            raise LockMisuse(
                "Skip is for the decorator: a `with` block cannot be skipped. Use Return or Raise."
            )
        hold = self.hold()
        entry = (self, hold)
        try:
            stack.append(entry)
            taken = self.take(hold, open_transaction=open_transaction)
            if isinstance(taken, Hold):
                return True
        except BaseException as error:
            # An interruption may come when it has been taken already.
            stack[:] = [one for one in stack if one is not entry]
            hold.empty(error)
            raise
        stack[:] = [one for one in stack if one is not entry]
        (self.side_effect or Return()).on_conflict(self._conflict(taken))
        return False

    def _conflict(self, refusal: Refusal) -> Conflict:
        return Conflict(key=self.name, reason=refusal.reason, waited=refusal.waited, look=self.holders)


def check_limit(limit: Any, name: str) -> None:
    """Refuse what is no number of holders; ``name`` is what the error calls it."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise LockMisuse(f"{name} must be an int of 1 or more, not {limit!r}.")


def _allowed(given: SideEffect | type[SideEffect]) -> SideEffect:
    effect = side_effect(given, "side_effect")
    if isinstance(effect, Retry):
        raise LockMisuse("Retry is for tasks: advisory(side_effect=...) takes Return, Raise or Skip.")
    return effect
