"""What Celery's signals are used for: tidying up."""

from __future__ import annotations

from typing import Any

from celery import signals

from celery_pglock.pool import close_leftovers, pool


def connect() -> None:
    """Connect the hooks; doing it again changes nothing."""
    signals.worker_init.connect(_refuse_eventlet, dispatch_uid="celery_pglock.worker_init")
    signals.task_postrun.connect(_leave_nothing_behind, dispatch_uid="celery_pglock.task_postrun")
    signals.worker_process_shutdown.connect(_close_idle, dispatch_uid="celery_pglock.worker_process_shutdown")
    signals.worker_shutdown.connect(_close_idle, dispatch_uid="celery_pglock.worker_shutdown")


def _refuse_eventlet(sender: Any = None, **_: Any) -> None:
    implementation = getattr(sender, "pool_cls", "")
    if "eventlet" in (getattr(implementation, "__module__", "") or str(implementation)):
        # SystemExit, because Celery only logs any other exception of a receiver.
        raise SystemExit(
            "celery_pglock does not work with the eventlet pool: waiting for PostgreSQL would block every "
            "other task. Use --pool=gevent, prefork, threads or solo."
        )


def _leave_nothing_behind(sender: Any = None, task_id: str = "", task: Any = None, **_: Any) -> None:
    # An eager task runs inside of somebody else's code, whose locks are none of its business.
    if task is not None and not task.request.is_eager:
        close_leftovers(f"Task {task.name}[{task_id}]")


def _close_idle(**_: Any) -> None:
    pool().close_idle()
