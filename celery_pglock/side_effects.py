"""What happens when a lock is taken: small values with one method each."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from django.db import DatabaseError

from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockMisuse, LockNotAcquired
from celery_pglock.holders import Holder

logger = logging.getLogger(__name__)

# Of a delay, how much is left at least.
LEAST_JITTER = 0.5


@dataclass(frozen=True)
class Conflict:
    """A lock that was not obtained, and what can be done about it.

    ``key`` names the lock's key, or its keys. ``waited`` is in seconds. ``attempt`` counts from 1, over the
    retries of one task; ``first_attempt`` and ``now`` are in seconds since the epoch. ``task`` and
    ``request`` are ``None`` outside of tasks.
    """

    key: str
    reason: str
    waited: float
    look: Callable[[], tuple[Holder, ...]] = field(repr=False)
    task: Any = None
    request: Any = None
    attempt: int = 1
    first_attempt: float = 0.0
    now: float = 0.0

    @cached_property
    def holders(self) -> tuple[Holder, ...]:
        """Who holds the lock's keys at the moment of the first look; empty if they have gone by then."""
        try:
            return self.look()
        except DatabaseError as error:
            logger.warning("Who holds lock %r could not be read: %s", self.key, error)
            return ()

    def error(self) -> LockNotAcquired:
        """What ``Raise`` raises."""
        return LockNotAcquired(self.key, self.reason, self.waited, [str(holder) for holder in self.holders])

    def skip(self, result: Any = None, *, chain: str = "continue") -> Any:
        """What ``Skip`` does."""
        return result

    def retry(self, countdown: float) -> Any:
        """What ``Retry`` does, after this many seconds; where there is no message to send, it raises."""
        raise self.error()


class SideEffect(ABC):
    """Subclass it and write ``on_conflict`` for a behaviour of your own.

    What ``on_conflict`` returns is the result of the task or of the decorated function, what it raises is
    its failure; ``conflict.skip(...)``, ``conflict.retry(...)`` and ``conflict.error()`` do what ours do.
    """

    @abstractmethod
    def on_conflict(self, conflict: Conflict) -> Any:
        """Decide what becomes of the caller."""


@dataclass(frozen=True)
class Return(SideEffect):
    """``with advisory(...) as acquired`` goes on, and ``acquired`` is False. Not for tasks."""

    def on_conflict(self, conflict: Conflict) -> bool:
        return False


@dataclass(frozen=True)
class Raise(SideEffect):
    """Raise ``LockNotAcquired``; a task fails with it."""

    def on_conflict(self, conflict: Conflict) -> Any:
        raise conflict.error()


@dataclass(frozen=True)
class Skip(SideEffect):
    """Do not run; a task succeeds with ``result``.

    ``chain="continue"`` hands ``result`` on to links, chain, group and chord; ``chain="stop"`` revokes
    what is left of the task's chain.
    """

    result: Any = None
    chain: str = "continue"

    def __post_init__(self) -> None:
        if self.chain not in ("continue", "stop"):
            raise LockMisuse(f'Skip(chain=...) is "continue" or "stop", not {self.chain!r}.')

    def on_conflict(self, conflict: Conflict) -> Any:
        return conflict.skip(self.result, chain=self.chain)


@dataclass(frozen=True)
class Retry(SideEffect):
    """Put the task back into its queue, to come again after a while. For tasks only.

    ``countdown`` is the first delay in seconds, each next one is ``backoff`` times as long, up to
    ``maximum``; ``jitter`` shortens each by up to a half at random. After ``max_retries`` retries, or
    ``deadline`` seconds since the first conflict, ``then`` decides, by default ``Raise()``. The
    task's own ``max_retries`` and ``request.retries`` are not touched.
    """

    countdown: Duration = 1
    maximum: Duration = 60
    backoff: float = 2
    jitter: bool = True
    max_retries: int | None = None
    deadline: Duration = None
    then: SideEffect | type[SideEffect] = field(default_factory=Raise)

    def __post_init__(self) -> None:
        for name in ("countdown", "maximum"):
            if seconds(getattr(self, name), f"Retry({name}=...)") is None:
                raise LockMisuse(f"Retry({name}=...) must be a number of seconds or a timedelta, not None.")
        seconds(self.deadline, "Retry(deadline=...)")
        if self.backoff < 1:
            raise LockMisuse(f"Retry(backoff=...) must be 1 or more, not {self.backoff!r}.")
        if self.max_retries is not None and self.max_retries < 0:
            raise LockMisuse(f"Retry(max_retries=...) must be 0 or more, or None, not {self.max_retries!r}.")
        last_resort = side_effect(self.then, "Retry(then=...)")
        if isinstance(last_resort, Retry | Return):
            raise LockMisuse(
                "Retry(then=...) decides when retrying is over: use Raise(), Skip() or your own."
            )

    def delay(self, attempt: int) -> float:
        """Seconds until the next attempt, after this many conflicts."""
        first = seconds(self.countdown, "countdown") or 0.0
        longest = seconds(self.maximum, "maximum") or 0.0
        try:
            delay = min(longest, first * float(self.backoff) ** (attempt - 1))
        except OverflowError:
            delay = longest
        return delay * random.uniform(LEAST_JITTER, 1) if self.jitter else delay

    def can_retry(self) -> bool:
        """Whether its deadline leaves time for a first retry, even with the luckiest jitter."""
        deadline = seconds(self.deadline, "deadline")
        first = min(seconds(self.countdown, "countdown") or 0.0, seconds(self.maximum, "maximum") or 0.0)
        return deadline is None or first * (LEAST_JITTER if self.jitter else 1) <= deadline

    def on_conflict(self, conflict: Conflict) -> Any:
        delay = self.delay(conflict.attempt)
        deadline = seconds(self.deadline, "deadline")
        spent = self.max_retries is not None and conflict.attempt > self.max_retries
        late = deadline is not None and conflict.now + delay > conflict.first_attempt + deadline
        if spent or late:
            return side_effect(self.then, "Retry(then=...)").on_conflict(conflict)
        return conflict.retry(delay)


def side_effect(given: object, where: str) -> SideEffect:
    """The side effect as an instance; a class is taken for what calling it gives."""
    if isinstance(given, type) and issubclass(given, SideEffect):
        given = given()
    if not isinstance(given, SideEffect):
        raise LockMisuse(f"{where} must be a side effect such as Skip(), Raise() or Retry(), not {given!r}.")
    return given
