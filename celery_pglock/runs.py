"""One run of a task under its lock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from celery.exceptions import Ignore
from django.db import DatabaseError

from celery_pglock import signals, work_connections
from celery_pglock.claims import Hold
from celery_pglock.conflicts import CONFLICTS, COPY, FIRST_CONFLICT, TaskConflict, succeeded_before
from celery_pglock.held_back import BrokerRefused, HeldBack, pauses
from celery_pglock.labels import Owner
from celery_pglock.locks import advisory
from celery_pglock.task_options import TaskOptions

logger = logging.getLogger(__name__)

LOOKS = 3

Body = Callable[..., Any]


def held_back_by(request: Any) -> HeldBack | None:
    """What the run of this request holds back; ``None`` where no lock of a run is held."""
    found: HeldBack | None = vars(request).get("pglock_held_back")
    return found


def run(task: Any, options: TaskOptions, body: Body, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the body under the task's lock, or do what its side effect says."""
    request = task.request
    lock = options.lock(args, kwargs)
    has_message = not request.called_directly and not request.is_eager
    reuses_connections = task.app.conf.get("CELERY_DB_REUSE_MAX")
    named = has_message and not reuses_connections
    with work_connections.named_after(request.id) if named else nullcontext():
        pause = pauses()
        while True:
            taken = _take_or_look(task, request, lock)
            if isinstance(taken, Hold):
                return _run_held(task, request, lock, taken, body, args, kwargs)
            signals.lock_conflict.send_robust(sender=task, lock=lock, conflict=taken)
            try:
                return taken.come_back() if taken.is_with_itself else options.effect().on_conflict(taken)
            except BrokerRefused as refused:
                logger.warning(
                    "%s waits in place for lock %r, or until the broker takes its retry: %s",
                    _name(task, request),
                    lock.name,
                    refused,
                )
                time.sleep(next(pause))


def _take_or_look(task: Any, request: Any, lock: advisory) -> Hold | TaskConflict:
    # A conflict whose holder has gone by the time of looking is none: it could even have been an earlier
    # delivery of this message, whose result is not to be replaced.
    for _ in range(LOOKS - 1):
        taken = _take(task, request, lock)
        if isinstance(taken, Hold) or taken.holders:
            return taken
    return _take(task, request, lock)


def _take(task: Any, request: Any, lock: advisory) -> Hold | TaskConflict:
    taken = lock.take(Owner(task.name, request.id or "", request.hostname or ""))
    headers = request.headers or {}
    if headers.get(COPY) and succeeded_before(task, request):
        if isinstance(taken, Hold):
            taken.give_back()
        raise Ignore("an earlier delivery of this message has succeeded")
    if isinstance(taken, Hold):
        return taken
    now = time.time()
    return TaskConflict(
        key=lock.name,
        reason=taken.reason,
        waited=taken.waited,
        look=lock.holders,
        task=task,
        request=request,
        attempt=headers.get(CONFLICTS, 0) + 1,
        first_attempt=headers.get(FIRST_CONFLICT, now),
        now=now,
        lock=lock,
    )


def _run_held(
    task: Any,
    request: Any,
    lock: advisory,
    hold: Hold,
    body: Body,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    held_back = HeldBack()
    ended_with: BaseException | None = None
    try:
        # A direct call has no request of its own: there is nothing to hang this on, nor to send.
        if not request.called_directly:
            request.pglock_held_back = held_back
        signals.lock_acquired.send_robust(sender=task, lock=lock, waited=hold.waited)
        return body(*args, **kwargs)
    except BaseException as error:
        ended_with = error
        raise
    finally:
        if not request.called_directly:
            del request.pglock_held_back
        _finish(task, request, lock, hold, held_back, ended_with)


def _finish(
    task: Any,
    request: Any,
    lock: advisory,
    hold: Hold,
    held_back: HeldBack,
    ended_with: BaseException | None,
) -> None:
    # Ignore is how `replace` ends a task that went well: its transaction commits.
    error = None if isinstance(ended_with, Ignore) else ended_with
    try:
        kept = hold.give_back(error)
    except DatabaseError:
        # The COMMIT failed: what the body wanted to follow it does not.
        raise
    except BaseException:
        held_back.send_all(_name(task, request))
        raise
    if kept:
        signals.lock_released.send_robust(sender=task, lock=lock, held=time.monotonic() - hold.since)
    else:
        reason = "its session ended before the work was done"
        logger.error("%s ran on without lock %r: %s", _name(task, request), lock.name, reason)
        signals.lock_lost.send_robust(sender=task, lock=lock, reason=reason)
    held_back.send_all(_name(task, request))


def _name(task: Any, request: Any) -> str:
    return f"Task {task.name}[{request.id}]"
