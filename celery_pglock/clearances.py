"""The way that is cleared for critical tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from celery_pglock import backends, config
from celery_pglock.backends import STILL_ENDING, TERMINATED, Stop, Victim
from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockMisuse
from celery_pglock.looks import FAILURES
from celery_pglock.models import BlockedPGLock, PGActivity
from celery_pglock.obstructions import (
    AS_CRITICAL,
    Blocker,
    Session,
    Situation,
    check_victims,
    look,
    rows_left,
    sessions_now,
)
from celery_pglock.printed_texts import one_line

logger = logging.getLogger(__name__)

# In seconds. PostgreSQL stops all taking of locks for the moment in which it tells who blocks whom.
LOOK_EVERY = 0.5


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms the way is cleared, checked; ``min_wait`` and ``grace`` in seconds."""

    using: str
    dry_run: bool
    min_wait: float
    grace: float
    max_victims: int
    requeue: bool

    def clear(self, pause: Callable[[float], object] = time.sleep) -> dict[str, Any]:
        """Stop those who are in the way of critical tasks, and tell of it in what JSON knows.

        ``pause`` waits so many seconds; what it raises ends the clearing. Raises Django's errors if the first
        look fails; what fails later is told.
        """
        found = look(self.using, self.min_wait)
        chosen, left = found.blockers[: self.max_victims], found.blockers[self.max_victims :]
        treatments = [Treatment(one) for one in chosen] if self.dry_run else stop(chosen, self, pause)
        _log(found, treatments, left, is_dry_run=self.dry_run)
        return {
            "dry_run": self.dry_run,
            "critical": [asdict(waiter) for waiter in found.waiters],
            "would_stop" if self.dry_run else "stopped": [one.in_json() for one in treatments],
            "spared": [one.in_json() for one in found.spared],
            "left": [one.in_json() for one in left],
        }


@dataclass(frozen=True, slots=True)
class Try:
    """One attempt to stop a session of a blocker."""

    action: str
    stop: Stop

    def __str__(self) -> str:
        return f"{self.action}: {self.stop}"

    def in_json(self) -> dict[str, Any]:
        return {"action": self.action, "pid": self.stop.pid, "outcome": self.stop.outcome}


@dataclass(frozen=True, slots=True)
class Treatment:
    """What was tried with a blocker, and what failed meanwhile."""

    blocker: Blocker
    tries: tuple[Try, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        return any(one.stop.is_done for one in self.tries)

    def __str__(self) -> str:
        became = "; ".join([*map(str, self.tries), *self.errors]) or "it made way by itself"
        return f"{self.blocker}, {self.blocker.reason}: {became}"

    def in_json(self) -> dict[str, Any]:
        tries = [one.in_json() for one in self.tries]
        return {**self.blocker.in_json(), "tries": tries, "errors": list(self.errors)}


def terms(
    *,
    dry_run: Any,
    min_wait: Duration,
    grace: Duration,
    max_victims: Any,
    requeue: Any,
    using: str | None,
) -> Terms:
    """These terms; what cannot be meant is refused with ``LockMisuse``."""
    for name, given in (("dry_run", dry_run), ("requeue", requeue)):
        if not isinstance(given, bool):
            raise LockMisuse(f"{_argument(name)} must be True or False, not {given!r}.")
    if isinstance(max_victims, bool) or not isinstance(max_victims, int) or max_victims < 1:
        raise LockMisuse(
            f"{_argument('max_victims')} must be an int of 1 or more, not {max_victims!r}; to stop nobody "
            f"use dry_run=True."
        )
    alias = config.current().USING if using is None else using
    config.check_alias(alias, _argument("using") if using is not None else "CELERY_PGLOCK['USING']")
    check_victims()
    return Terms(
        alias, dry_run, _bounded(min_wait, "min_wait"), _bounded(grace, "grace"), max_victims, requeue
    )


def stop(
    chosen: Sequence[Blocker], terms: Terms, pause: Callable[[float], object] = time.sleep
) -> list[Treatment]:
    """Cancel what they run; end the sessions of those who are in the way still when the grace is over."""
    tried: dict[Blocker, list[Try]] = {blocker: [] for blocker in chosen}
    failed: dict[Blocker, list[str]] = {blocker: [] for blocker in chosen}

    def attempt(action: Callable[[Blocker, Terms], Iterator[Try]], blocker: Blocker) -> None:
        try:
            for one in action(blocker, terms):
                tried[blocker].append(one)
        except FAILURES as error:
            failed[blocker].append(one_line(error))

    for blocker in chosen:
        attempt(_cancel, blocker)
    for blocker in _still_there(chosen, terms, pause):
        attempt(_terminate, blocker)
    return [Treatment(blocker, tuple(tried[blocker]), tuple(failed[blocker])) for blocker in chosen]


def _cancel(blocker: Blocker, terms: Terms) -> Iterator[Try]:
    for session in blocker.sessions:
        if session.is_active:
            victims = [_victim(session, blocker, terms, blocker.rows)]
            for one in backends.cancel(victims, BlockedPGLock._meta.db_table, terms.using):
                yield Try("cancel", one)


def _terminate(blocker: Blocker, terms: Terms) -> Iterator[Try]:
    # The work before the lock: nothing of the task may be committed when somebody else has its lock. With its
    # first session a task may be out of the way, and all the others end nonetheless.
    has_begun = False
    for session in sessions_now(blocker, terms.using):
        rows: tuple[Any, ...] = (session.pid,) if has_begun else blocker.rows
        view = (PGActivity if has_begun else BlockedPGLock)._meta.db_table
        for one in backends.terminate([_victim(session, blocker, terms, rows)], view, terms.using):
            has_begun |= one.outcome in (TERMINATED, STILL_ENDING)
            yield Try("terminate", one)


def _victim(session: Session, blocker: Blocker, terms: Terms, rows: tuple[Any, ...]) -> Victim:
    return Victim(
        session.pid,
        session.backend_start,
        session.application_name,
        rows,
        blocker.reason,
        terms.requeue if blocker.task_id else None,
    )


def _still_there(
    chosen: Sequence[Blocker], terms: Terms, pause: Callable[[float], object]
) -> Sequence[Blocker]:
    """Those who do not make way within the grace."""
    give_up = time.monotonic() + terms.grace
    while chosen and (left := give_up - time.monotonic()) > 0:
        pause(min(left, LOOK_EVERY))
        try:
            rows = rows_left(chosen, terms.using)
        except FAILURES as error:
            logger.warning("Who is in the way still could not be read: %s", one_line(error))
            continue
        chosen = [blocker for blocker in chosen if not rows.isdisjoint(blocker.rows)]
    return chosen


def _argument(name: str) -> str:
    return f"prioritize_critical_tasks({name}=...)"


def _bounded(given: Duration, name: str) -> float:
    found = seconds(given, _argument(name))
    if found is None or found == float("inf"):
        raise LockMisuse(f"{_argument(name)} must be a number of seconds or a timedelta, not {given!r}.")
    return found


def _log(
    found: Situation, treatments: Sequence[Treatment], left: Sequence[Blocker], *, is_dry_run: bool
) -> None:
    for treatment in treatments:
        if is_dry_run:
            logger.info("Would stop %s, %s", treatment.blocker, treatment.blocker.reason)
        elif treatment.is_done:
            logger.warning("Stopped %s", treatment)
        else:
            logger.log(logging.ERROR if treatment.errors else logging.INFO, "Did not stop %s", treatment)
    for spared in found.spared:
        # Critical tasks may wait for each other, look by look: nobody need do anything about it.
        is_expected = spared.reason.startswith(AS_CRITICAL)
        logger.log(logging.DEBUG if is_expected else logging.ERROR, "%s", spared)
    if left:
        logger.warning("%d more are in the way of critical tasks, and have their turn next", len(left))
