"""The tasks, and the base classes of tasks, for ``from celery_pglock.tasks import ...``."""

from __future__ import annotations

from typing import Any

from celery import shared_task
from django.apps import apps

from celery_pglock.audits import acting
from celery_pglock.config import current
from celery_pglock.durations import Duration
from celery_pglock.errors import LockMisuse
from celery_pglock.side_effects import Skip
from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask

__all__ = ["AdvisoryTask", "XactAdvisoryTask", "prioritize_critical_tasks"]

PRIORITIZE = "celery_pglock.prioritize_critical_tasks"


def _one_runner(*, using: str | None = None, **_: Any) -> str:
    return f"{PRIORITIZE}(using={current().USING if using is None else using})"


@shared_task(
    name=PRIORITIZE,
    base=AdvisoryTask,
    lock_key=_one_runner,
    lock_timeout=0,
    lock_side_effect=Skip(),
    lock_strict=False,
    lock_on_direct_call=True,
)
def prioritize_critical_tasks(
    *,
    dry_run: bool = False,
    min_wait: Duration = 10,
    grace: Duration = 5,
    max_victims: int = 5,
    requeue: bool = True,
    using: str | None = None,
) -> dict[str, Any]:
    """Stop who is in the way of tasks with ``lock_priority``, and tell of it; ``None`` while another does.

    dry_run:
        Only tell who would be stopped.
    min_wait:
        Seconds (a number or a timedelta) that a critical task has to have waited for a lock.
    grace:
        Seconds between cancelling what is in the way runs, and ending its sessions.
    max_victims:
        How many tasks, or backends that work for none, are stopped at most.
    requeue:
        Whether tasks that are stopped go back to their queues; else they fail with ``Preempted``.
    using:
        Alias in ``DATABASES`` where the way is cleared. Unset: ``CELERY_PGLOCK["USING"]``.
    """
    terms = checked(
        dry_run=dry_run,
        min_wait=min_wait,
        grace=grace,
        max_victims=max_victims,
        requeue=requeue,
        using=using,
    )
    with acting("beat", PRIORITIZE):
        summary: dict[str, Any] = terms.clear()
    return summary


def checked(**options: Any) -> Any:
    """The options of ``prioritize_critical_tasks`` as terms on which the way can be cleared."""
    if not apps.is_installed("celery_pglock"):
        raise LockMisuse(f"{PRIORITIZE} needs 'celery_pglock' in INSTALLED_APPS, migrated.")
    # Without the app its models cannot even be imported.
    from celery_pglock import clearances

    return clearances.terms(**options)
