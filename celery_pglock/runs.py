"""One run of a task under its lock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from celery.exceptions import Ignore, SoftTimeLimitExceeded, TaskPredicate
from celery.exceptions import Retry as RetryLater
from django.db import DatabaseError, InterfaceError, InternalError, OperationalError
from psycopg.errors import AdminShutdown, QueryCanceled

from celery_pglock import clocks, log_records, preemptions, signals, work_connections
from celery_pglock.claims import ENDED, Hold, Refusal
from celery_pglock.conflicts import (
    AFTER_PREEMPTION,
    CONFLICTS,
    COPY,
    FIRST_CONFLICT,
    PREEMPTED,
    TaskConflict,
    succeeded_before,
)
from celery_pglock.durations import MaybeSeconds
from celery_pglock.errors import LockLost, Preempted
from celery_pglock.held_back import BrokerRefused, HeldBack, pauses
from celery_pglock.held_locks import HeldLock, body_of
from celery_pglock.holders import Holder
from celery_pglock.interruptions import Interruption, can_interrupt
from celery_pglock.labels import Owner
from celery_pglock.locks import advisory
from celery_pglock.preemptions import Preemption
from celery_pglock.task_options import TaskOptions

logger = logging.getLogger(__name__)

# How often a lock is tried whose holder has gone by the time of looking.
ATTEMPTS = 3

# What says that no lock can be taken now, in contrast to what says that none ever could.
OUTAGES = (OperationalError, InterfaceError, InternalError)

Body = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Outage:
    """Nothing could be asked of PostgreSQL; the error says why."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Stopped:
    """The task was stopped for a critical one."""

    error: Preempted


class ReplacedEagerly(Ignore):
    """An eager task replaced itself; carries what stands in for it once the lock is free."""

    def __init__(self, signature: Any) -> None:
        super().__init__("Replaced by new task")
        self.signature = signature


def held_back_by(request: Any) -> HeldBack | None:
    """What the run of this request holds back; ``None`` where no lock of a run is held."""
    found: HeldBack | None = vars(request).get("pglock_held_back")
    return found


@dataclass(slots=True)
class Run:
    """One run of a task: who runs it, and under which lock.

    ``began`` is of its newest attempt, on the clock that is never set. ``was_preempted`` tells whether an
    attempt, or an earlier run of this message, was stopped for a critical task.
    """

    task: Any
    request: Any
    lock: advisory
    on_lost: str
    priority: int
    is_direct_call: bool
    was_preempted: bool
    began: float = 0.0

    @property
    def has_message(self) -> bool:
        return not self.is_direct_call and not self.request.is_eager

    def __str__(self) -> str:
        return f"Task {self.task.name}[{self.request.id}]"

    def about(self, what: str, **facts: Any) -> dict[str, Any]:
        """The ``extra`` of a log record."""
        return log_records.about(what, self.task, self.request, self.lock.name, **facts)


def run(
    task: Any,
    options: TaskOptions,
    body: Body,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    is_direct_call: bool,
) -> Any:
    """Run the body under the task's lock, or do what its side effect says."""
    request = task.request
    lock = options.lock(args, kwargs)
    this = Run(
        task,
        request,
        lock,
        options.what_if_lost(),
        options.priority,
        is_direct_call,
        was_preempted=PREEMPTED in (request.headers or {}),
    )
    if not is_direct_call:
        request.pglock_lock = lock
    elif vars(request).get("pglock_lock") == lock:
        # A task that calls itself: its own lock is held already.
        return body(*args, **kwargs)
    # With connections that Celery reuses, a name would outlive its task.
    named = this.has_message and not _keeps_connections(task.app)
    with (
        work_connections.named_after(request.id) if named else nullcontext(),
        work_connections.marked(request.id, options.priority) if this.has_message else nullcontext(),
    ):
        pause = pauses()
        while True:
            this.began = clocks.now()
            try:
                outcome = _attempt(this, body, args, kwargs)
            except ReplacedEagerly as replaced:
                return replaced.signature.apply().get()
            except Exception as error:
                outcome = _stopped(this, error)
                if outcome is None:
                    raise
            if (ended_by := _what_ended_the_wait(outcome)) is not None:
                outcome = _stopped(this, ended_by) or outcome
            if not isinstance(outcome, TaskConflict | Outage | Stopped):
                return outcome
            try:
                return _without_the_body(this, options, outcome)
            except BrokerRefused as refused:
                logger.warning(
                    "%s waits in place for lock %r, or until the broker takes its retry: %s",
                    this,
                    lock.name,
                    refused,
                    extra=_about_waiting(this, outcome),
                )
                time.sleep(next(pause))


@lru_cache
def _keeps_connections(app: Any) -> bool:
    # Celery, too, asks once.
    return bool(app.conf.get("CELERY_DB_REUSE_MAX"))


def _without_the_body(this: Run, options: TaskOptions, why: TaskConflict | Outage | Stopped) -> Any:
    """What follows where the body did not run, or not to its end."""
    if isinstance(why, Outage):
        return _conflict(this, str(why.error), 0, ()).come_back_after(why.error)
    if isinstance(why, Stopped):
        return _conflict(this, str(why.error), 0, ()).come_back_preempted(why.error)
    outcome = "raised"
    try:
        if why.is_with_itself:
            outcome = "redelivered"
            return why.come_back()
        result = why.settled_by(AFTER_PREEMPTION if this.was_preempted else options.effect())
        outcome = "skipped"
        return result
    except RetryLater:
        outcome = "retried"
        raise
    except BrokerRefused:
        outcome = "waits"
        raise
    finally:
        _tell_of_a_conflict(this, why, outcome)


def _tell_of_a_conflict(this: Run, conflict: TaskConflict, outcome: str) -> None:
    if outcome in ("retried", "raised", "redelivered"):
        # Celery's own record of it has a text alone.
        logger.debug(
            "%s is %s: lock %r is held by %s",
            this,
            outcome,
            conflict.key,
            ", ".join(map(str, conflict.holders)),
            extra=log_records.about_conflict("conflict", conflict, outcome=outcome),
        )
    told = signals.lock_conflict.send_robust(
        sender=this.task, lock=this.lock, conflict=conflict, outcome=outcome
    )
    if outcome == "waits":
        _heed_the_time_limit(told)


def _about_waiting(this: Run, why: TaskConflict | Outage | Stopped) -> dict[str, Any]:
    if isinstance(why, TaskConflict):
        return log_records.about_conflict("waits", why, outcome="waits")
    return this.about("waits", reason=str(why.error).strip())


def _what_ended_the_wait(outcome: Any) -> Exception | None:
    """The error of somebody who ended the wait for the lock; ``None`` if it ended otherwise."""
    if isinstance(outcome, TaskConflict) and outcome.reason.startswith(ENDED):
        return outcome.error()
    if isinstance(outcome, Outage) and isinstance(outcome.error.__cause__, QueryCanceled | AdminShutdown):
        return outcome.error
    return None


def _stopped(this: Run, error: Exception) -> Stopped | None:
    """Whether the attempt ended with this error because it was stopped for a critical task."""
    found = None if isinstance(error, TaskPredicate) else _preemption(this, error)
    if found is None:
        return None
    preempted = Preempted(this.lock.name, found.by, found.reason)
    if not found.comes_back:
        raise preempted from error
    preempted.__cause__ = error
    this.was_preempted = True
    return Stopped(preempted)


def _preemption(this: Run, error: BaseException | None) -> Preemption | None:
    """The act by which this attempt was stopped, if the error may come of one."""
    if error is None or not this.has_message or not preemptions.may_be_of_a_stop(error):
        return None
    aliases = {this.lock.using, *work_connections.aliases()}
    return preemptions.newest(this.request.id, aliases, this.began)


def _attempt(this: Run, body: Body, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The body's result, a conflict, or an outage.

    A conflict whose holder has gone by the time of looking is none: it could even have been an earlier
    delivery of this message, whose result is not to be replaced.
    """
    timeout, waited = this.lock.timeout, 0.0
    for _ in range(ATTEMPTS):
        outcome = _run_held(this, timeout, body, args, kwargs)
        if not isinstance(outcome, Refusal):
            return outcome
        waited += outcome.waited
        try:
            holders = this.lock.holders()
        except OUTAGES as outage:
            return Outage(outage)
        if holders:
            break
        timeout = 0.0
    return _conflict(this, outcome.reason, waited, holders)


def _run_held(
    this: Run, timeout: MaybeSeconds, body: Body, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """The body's result, or why the lock was not obtained: a refusal or an outage."""
    task, request = this.task, this.request
    owner = Owner(task.name, request.id or "", request.hostname or "", this.priority)
    hold = this.lock.hold()
    held_back = HeldBack()
    ended_with: BaseException | None = None
    try:
        try:
            refusal = this.lock.fill(hold, owner, timeout)
        except OUTAGES as outage:
            hold.empty(outage)
            return Outage(outage)
        _drop_a_copy_of_what_succeeded(this, hold)
        if refusal:
            return refusal
        if loss := hold.loss:
            hold.empty(None)
            return Outage(OperationalError(f"The lock was lost before the body began: {loss}."))
        # A direct call has no request of its own: there is nothing to hang this on, nor to send.
        if not this.is_direct_call:
            request.pglock_held_back = held_back
        if hold.keys:
            _tell_that_it_was_acquired(this, hold)
        return _run_body(this, hold, body, args, kwargs)
    except BaseException as error:
        ended_with = error
        raise
    finally:
        if not this.is_direct_call:
            vars(request).pop("pglock_held_back", None)
        _finish(this, hold, held_back, ended_with)


def _tell_that_it_was_acquired(this: Run, hold: Hold) -> None:
    headers = this.request.headers or {}
    conflicts, now = headers.get(CONFLICTS, 0), time.time()
    told = signals.lock_acquired.send_robust(
        sender=this.task,
        lock=this.lock,
        waited=hold.waited,
        attempt=conflicts + 1,
        # Hosts' clocks differ.
        delayed=max(0.0, now - headers.get(FIRST_CONFLICT, now)) if conflicts else 0.0,
    )
    _heed_the_time_limit(told)


def _heed_the_time_limit(told: Sequence[tuple[Any, Any]]) -> None:
    for _, answer in told:
        # The time limit of the task, which has not failed as a receiver does, and comes once only.
        if isinstance(answer, SoftTimeLimitExceeded):
            raise answer


def _run_body(this: Run, hold: Hold, body: Body, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    interruption = Interruption()
    with body_of(this.task.name, HeldLock(hold, this.lock.strict, interruption)):
        if this.on_lost != "interrupt" or hold.session is None or not (this.has_message and can_interrupt()):
            return body(*args, **kwargs)

        def interrupt(loss: str) -> None:
            interruption.order(LockLost(hold.name, loss))

        try:
            hold.session.to_be_told.append(interrupt)
            return interruption.run(body, args, kwargs)
        finally:
            if interrupt in hold.session.to_be_told:
                hold.session.to_be_told.remove(interrupt)


def _drop_a_copy_of_what_succeeded(this: Run, hold: Hold) -> None:
    if (this.request.headers or {}).get(COPY) and succeeded_before(this.task, this.request):
        # Nobody was told that it has the lock.
        hold.empty(None)
        raise Ignore("an earlier delivery of this message has succeeded")


def _conflict(this: Run, reason: str, waited: float, holders: tuple[Holder, ...]) -> TaskConflict:
    headers = this.request.headers or {}
    now = time.time()
    return TaskConflict(
        key=this.lock.name,
        reason=reason,
        waited=waited,
        look=lambda: holders,
        task=this.task,
        request=this.request,
        attempt=headers.get(CONFLICTS, 0) + 1,
        first_attempt=headers.get(FIRST_CONFLICT, now),
        now=now,
        lock=this.lock,
        has_message=this.has_message,
    )


def _finish(this: Run, hold: Hold, held_back: HeldBack, ended_with: BaseException | None) -> None:
    # Ignore is how `replace` ends a task that went well: its transaction commits.
    error = None if isinstance(ended_with, Ignore) else ended_with
    loss = hold.loss
    try:
        kept = hold.give_back(error)
    except BaseException as failure:
        # What the body wanted to follow its COMMIT does not, if that has failed.
        if not isinstance(failure, DatabaseError):
            _send(this, held_back)
        raise
    held = time.monotonic() - hold.since
    if kept and hold.keys:
        signals.lock_released.send_robust(sender=this.task, lock=this.lock, held=held)
    elif not kept:
        loss = loss or "its session was ended before it was given back"
        _tell_that_it_was_lost(this, loss, held)
        if this.lock.xact and ended_with is None:
            # What was to follow the COMMIT does not.
            raise LockLost(this.lock.name, f"{loss}, and the work rolled back")
    if isinstance(ended_with, RetryLater) and _preemption(this, ended_with.exc):
        # Of what stopped it the body made a retry of its own, which is not to be skipped either.
        held_back.put_into_headers(PREEMPTED)
    _send(this, held_back)
    if not kept and ended_with is None and this.on_lost == "fail":
        raise LockLost(this.lock.name, loss)


def _send(this: Run, held_back: HeldBack) -> None:
    if not held_back.is_empty:
        held_back.send_all(this.task.app, str(this), this.about("waits"))


def _tell_that_it_was_lost(this: Run, loss: str, held: float) -> None:
    work_connections.close_what_was_interrupted()
    work_connections.close_what_is_broken()
    logger.error(
        "%s lost lock %r before it gave it back: %s",
        this,
        this.lock.name,
        loss,
        extra=this.about("lost", held=held, reason=loss),
    )
    signals.lock_lost.send_robust(sender=this.task, lock=this.lock, reason=loss, held=held)
