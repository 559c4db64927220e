"""What a task does when its lock is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded, TaskRevokedError
from celery.exceptions import Retry as RetryLater

from celery_pglock import labels, log_records, signals
from celery_pglock.brokers import visibility_timeout
from celery_pglock.errors import Preempted
from celery_pglock.held_back import publish
from celery_pglock.side_effects import Conflict, Retry, SideEffect

logger = logging.getLogger(__name__)

# Message headers of ours. They count the conflicts of one task, apart from its own retries.
CONFLICTS = "pglock_conflicts"
FIRST_CONFLICT = "pglock_first_conflict"
COPY = "pglock_copy"
OUTAGES = "pglock_outages"
PREEMPTED = "pglock_preempted"
HEADERS = (CONFLICTS, FIRST_CONFLICT, COPY, OUTAGES, PREEMPTED)

# How Celery ends a task that was replaced: in its place another goes on.
REPLACED = "Replaced by new task"

COMES_BACK = Retry(countdown=5)
AFTER_OUTAGE = Retry(countdown=1, maximum=30)
# The critical task may have the lock by now. Whoever had it before has its turn again, and is not skipped.
AFTER_PREEMPTION = Retry(countdown=1, maximum=30)

_warned: set[str] = set()


def without_our_headers(headers: dict[str, Any] | None) -> dict[str, Any]:
    """The headers of a message that starts counting anew."""
    return {name: value for name, value in (headers or {}).items() if name not in HEADERS}


@dataclass(frozen=True)
class TaskConflict(Conflict):
    """A conflict of a task, with what only tasks can do about it."""

    lock: Any = None
    has_message: bool = False

    @property
    def is_with_itself(self) -> bool:
        """Whether the holder is the same message, delivered before."""
        if not self.has_message:
            return False
        cut = labels.task_id_of(labels.application_name(labels.LOCK_SESSION, self.request.id))
        return any(holder.task_id in (self.request.id, cut) for holder in self.holders)

    def settled_by(self, effect: SideEffect) -> Any:
        """What the side effect makes of it."""
        try:
            return effect.on_conflict(self)
        except (Ignore, Reject) as ended:
            self._tell_what_never_runs(ended)
            raise

    def skip(self, result: Any = None, *, chain: str = "continue") -> Any:
        if result is None and self.has_message and self.request.chord:
            self._warn_of_none()
        holders = ", ".join(map(str, self.holders)) or "somebody who has gone by now"
        logger.info(
            "Task %s[%s] skipped: lock %r is held by %s",
            self.task.name,
            self.request.id,
            self.key,
            holders,
            extra=log_records.about_conflict("conflict", self, outcome="skipped"),
        )
        signals.lock_skipped.send_robust(sender=self.task, lock=self.lock, conflict=self)
        if chain == "stop" and self.request.chain:
            _revoke(self.task.backend, self.request.chain, f"skipped: lock {self.key!r} is held by {holders}")
            self.request.chain = None
        return result

    def retry(self, countdown: float) -> Any:
        error = self.error()
        countdown = min(countdown, _longest_countdown(self.task.app))
        if not self.has_message and not self.request.is_eager:
            raise error
        if not self.has_message:
            raise _retry_later(error, countdown, is_eager=True)
        again = self._again(countdown, **self._counted())
        publish(self.task.app, again.apply_async)
        raise _retry_later(error, countdown, sig=again)

    def come_back(self) -> Any:
        """Send the message again for later, and leave the task's state to the run that has the lock."""
        countdown = min(COMES_BACK.delay(self.attempt), _longest_countdown(self.task.app))
        publish(self.task.app, self._again(countdown, **self._counted(), **{COPY: True}).apply_async)
        raise Ignore(f"lock {self.key!r} is held by an earlier delivery of this message")

    def come_back_after(self, outage: Exception) -> Any:
        """Send the message again for when PostgreSQL can be asked; it is no conflict, and counts as none."""
        if not self.has_message:
            raise outage
        number = (self.request.headers or {}).get(OUTAGES, 0) + 1
        countdown = min(AFTER_OUTAGE.delay(number), _longest_countdown(self.task.app))
        again = self._again(countdown, **{OUTAGES: number})
        publish(self.task.app, again.apply_async)
        logger.warning(
            "Task %s[%s] did not run and comes back in %.1f s, because lock %r cannot be taken: %s",
            self.task.name,
            self.request.id,
            countdown,
            self.key,
            str(outage).strip(),
            extra=self._comes_back("outage", countdown, str(outage).strip()),
        )
        if (self.request.headers or {}).get(COPY) or (self.request.delivery_info or {}).get("redelivered"):
            # The state may be that of an earlier delivery, which runs.
            raise Ignore("no lock can be taken now")
        raise _retry_later(outage, countdown, sig=again)

    def come_back_preempted(self, preempted: Preempted) -> Any:
        """Send the message again, whose run was stopped."""
        countdown = min(AFTER_PREEMPTION.delay(1), _longest_countdown(self.task.app))
        again = self._again(countdown, **{PREEMPTED: True, CONFLICTS: 0, OUTAGES: 0})
        publish(self.task.app, again.apply_async)
        logger.warning(
            "Task %s[%s] comes back in %.1f s: %s",
            self.task.name,
            self.request.id,
            countdown,
            preempted,
            extra=self._comes_back("preempted", countdown, str(preempted)),
        )
        raise _retry_later(preempted, countdown, sig=again)

    def _warn_of_none(self) -> None:
        if self.task.name not in _warned:
            _warned.add(self.task.name)
            logger.warning(
                "Task %s[%s] hands None to the body of its chord, because it was skipped. Say by "
                "Skip(result=...) what the body can use, or let the task come back by Retry(). This is told "
                "once of each task.",
                self.task.name,
                self.request.id,
            )

    def _tell_what_never_runs(self, ended: Ignore | Reject) -> None:
        comes_again = getattr(ended, "requeue", False) or REPLACED in ended.args
        hangs = "chord" if self.request.chord else "chain" if self.request.chain else ""
        if hangs and self.has_message and not comes_again:
            logger.error(
                "Task %s[%s] was ended by %s, raised by its side effect: the rest of its %s never runs. "
                "Return conflict.skip(...) or conflict.retry(...) instead, or raise conflict.error().",
                self.task.name,
                self.request.id,
                type(ended).__name__,
                hangs,
            )

    def _counted(self) -> dict[str, Any]:
        return {CONFLICTS: self.attempt, FIRST_CONFLICT: self.first_attempt, OUTAGES: 0}

    def _again(self, countdown: float, **headers: Any) -> Any:
        return self.task.signature_from_request(
            self.request,
            countdown=countdown,
            retries=self.request.retries,
            headers={**(self.request.headers or {}), **headers},
        )

    def _comes_back(self, what: str, countdown: float, reason: str) -> dict[str, Any]:
        return log_records.about(what, self.task, self.request, self.key, countdown=countdown, reason=reason)


def succeeded_before(task: Any, request: Any) -> bool:
    """Whether the result backend knows that an earlier delivery of this message succeeded."""
    try:
        return bool(task.backend.get_state(request.id) == states.SUCCESS)
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:
        logger.info("The state of %s[%s] is not known, so it runs again: %s", task.name, request.id, error)
        return False


def _retry_later(error: Exception, countdown: float, **details: Any) -> RetryLater:
    # Celery's stubs ask for numbers.Real, which no number of Python's is to a type checker.
    when: Any = countdown
    return RetryLater(exc=error, when=when, **details)


def _longest_countdown(app: Any) -> float:
    # Whoever states one means it, also where it is not known whether the transport has one.
    timeout = (app.conf.broker_transport_options or {}).get("visibility_timeout") or visibility_timeout(app)
    return float(timeout or "inf") / 4


def _revoke(backend: Any, chain: list[dict[str, Any]], reason: str) -> None:
    """Mark all the steps of a chain as revoked, with the chords that wait for them."""
    steps = _with_chord_bodies(chain)
    named = next((request for request in map(_request_of, steps) if request.id), None)
    if named is not None:
        # Through the one public way that also tells chords and the bodies of chords.
        named.chain = [
            step for step in _with_chord_bodies(chain) if step["options"].get("task_id") != named.id
        ]
        backend.mark_as_failure(
            named.id, TaskRevokedError(reason), request=named, call_errbacks=False, state=states.REVOKED
        )


def _with_chord_bodies(chain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bodies = [step["kwargs"]["body"] for step in chain if step.get("subtask_type") == "chord"]
    return [*chain, *(_with_chord_bodies(bodies) if bodies else [])]


def _request_of(step: dict[str, Any]) -> Any:
    request = Context(step)
    request.update(step["options"])
    request.id = step["options"].get("task_id")
    request.group = step["options"].get("group_id")
    return request
