"""What Celery's signals are used for: tidying up."""

from __future__ import annotations

import logging
from typing import Any

from celery import current_app, signals, states
from django.db import DatabaseError
from django.db.backends.signals import connection_created

from celery_pglock import (
    config,
    events,
    inspections,
    interruptions,
    lock_sequences,
    locks,
    log_records,
    work_connections,
)
from celery_pglock.errors import LockMisuse
from celery_pglock.pool import close_leftovers, pool
from celery_pglock.raw_connections import OnStandby
from celery_pglock.sessions import check_alias
from celery_pglock.task_options import TaskOptions, session_level_aliases

logger = logging.getLogger(__name__)


def connect() -> None:
    """Connect the hooks; doing it again changes nothing."""
    signals.worker_init.connect(_refuse_what_cannot_work, dispatch_uid="celery_pglock.worker_init")
    signals.worker_init.connect(_answer_inspections, dispatch_uid="celery_pglock.inspections")
    signals.worker_init.connect(_send_events, dispatch_uid="celery_pglock.events")
    signals.worker_process_init.connect(_send_events_of_a_child, dispatch_uid="celery_pglock.child_events")
    signals.task_prerun.connect(_note_what_is_held, dispatch_uid="celery_pglock.task_prerun")
    signals.task_postrun.connect(_leave_nothing_behind, dispatch_uid="celery_pglock.task_postrun")
    connection_created.connect(work_connections.mark_a_new_one, dispatch_uid="celery_pglock.marked")
    signals.worker_process_shutdown.connect(_close_idle, dispatch_uid="celery_pglock.worker_process_shutdown")
    signals.worker_shutdown.connect(_close_idle, dispatch_uid="celery_pglock.worker_shutdown")


def _refuse_what_cannot_work(sender: Any = None, **_: Any) -> None:
    # SystemExit, because Celery only logs any other exception of a receiver. First this, because among
    # eventlet's greenlets no session can be opened to check the rest.
    implementation = getattr(sender, "pool_cls", "")
    if "eventlet" in (getattr(implementation, "__module__", "") or str(implementation)):
        raise SystemExit(
            "celery_pglock does not work with the eventlet pool: waiting for PostgreSQL would block every "
            "other task. Use --pool=gevent, prefork, threads or solo."
        )
    try:
        config.current()
        for alias, strict in session_level_aliases(sender.app).items():
            _check(alias, strict=strict)
    except LockMisuse as misuse:
        raise SystemExit(str(misuse)) from None


def _answer_inspections(**_: Any) -> None:
    inspections.register()


def _send_events(sender: Any = None, **_: Any) -> None:
    events.follow(sender)


def _send_events_of_a_child(**_: Any) -> None:
    # One that was forked has its parent's receivers.
    events.follow_child(current_app)


def _check(alias: str, *, strict: bool) -> None:
    try:
        check_alias(alias, strict=strict)
    except OnStandby as standby:
        raise LockMisuse(str(standby)) from None
    except DatabaseError as error:
        # It may be away for a while; each session is checked again when it is opened.
        logger.warning("Alias %r could not be checked, and is when it is first used: %s", alias, error)


def _note_what_is_held(task: Any = None, **_: Any) -> None:
    # A process may hold a lock of its own for as long as it lives.
    if task is not None:
        task.request.pglock_held_before = tuple(pool().leased.values())


def _leave_nothing_behind(task_id: str = "", task: Any = None, state: str = "", **_: Any) -> None:
    # An eager task runs inside of somebody else's code, whose locks are none of its business.
    if task is None or task.request.is_eager:
        return
    name = f"Task {task.name}[{task_id}]"
    interruptions.forget_what_was_left()
    if close_leftovers(name, but=vars(task.request).get("pglock_held_before", ())):
        locks.forget_what_was_left()
        lock_sequences.forget_what_was_left()
    options = getattr(task, "_lock_options", None)
    if isinstance(options, TaskOptions) and options.xact:
        work_connections.roll_back_what_was_left(name)
    ran = state in (states.SUCCESS, states.FAILURE)
    if ran and options and "pglock_lock" not in vars(task.request):
        logger.error(
            "%s did not take its lock: its class overrides __call__ without calling super()",
            name,
            extra=log_records.about("not_locked", task, task.request, ""),
        )


def _close_idle(**_: Any) -> None:
    pool().close_idle()
    events.send_the_last()
