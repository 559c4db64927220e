"""The tasks, and the base classes of tasks, for ``from celery_pglock.tasks import ...``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from celery import shared_task
from django.apps import apps

from celery_pglock import config, running_tasks, signals
from celery_pglock.audits import acting
from celery_pglock.durations import Duration
from celery_pglock.errors import LockMisuse
from celery_pglock.side_effects import Skip
from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask

__all__ = ["AdvisoryTask", "XactAdvisoryTask", "prioritize_critical_tasks", "report_locks"]

logger = logging.getLogger(__name__)

REPORT = "celery_pglock.report_locks"
PRIORITIZE = "celery_pglock.prioritize_critical_tasks"


def _one_for_each_alias(name: str) -> Callable[..., str]:
    """The key of a task: the same for an alias, whether it is named or left to the settings."""

    def key(using: str | None = None, *_: Any, **__: Any) -> str:
        return f"{name}(using={config.current().USING if using is None else using})"

    return key


@shared_task(
    bind=True,
    base=AdvisoryTask,
    name=REPORT,
    ignore_result=False,
    lock_key=_one_for_each_alias(REPORT),
    lock_timeout=0,
    lock_side_effect=Skip(),
    lock_strict=False,
)
def report_locks(
    self: Any,
    using: str | None = None,
    held_after: float | None = None,
    waiting_after: float | None = None,
    skipped_after: int | None = None,
) -> dict[str, Any]:
    """Tell what should be known of the locks of an alias: to the log, a signal and the history.

    What is ``None`` is taken from ``CELERY_PGLOCK``; durations are in seconds.
    """
    _refuse_without_app(REPORT)
    # Their models can be imported only with the app.
    from celery_pglock import histories, reports

    alias = using or config.current().USING
    config.check_alias(alias, "report_locks(using=...)" if using else "CELERY_PGLOCK['USING']")
    report = reports.report(
        alias,
        reports.thresholds(held_after, waiting_after, skipped_after),
        lambda runs: running_tasks.not_running(self.app, runs),
        task_id=self.request.id or "",
    )
    report = replace(report, unread=(*report.unread, *histories.keep(report)))
    for finding in report.findings:
        logger.warning("Locks of alias %r: %s", alias, finding["text"])
    for unread in report.unread:
        logger.warning("Locks of alias %r, not told: %s", alias, unread)
    if not report.findings:
        logger.info("Locks of alias %r: nothing to tell of %s", alias, report.totals())
    signals.locks_reported.send_robust(sender=None, report=report, using=alias)
    return report.in_json()


@shared_task(
    name=PRIORITIZE,
    base=AdvisoryTask,
    lock_key=_one_for_each_alias(PRIORITIZE),
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
    _refuse_without_app(PRIORITIZE)
    # Without the app its models cannot even be imported.
    from celery_pglock import clearances

    return clearances.terms(**options)


def _refuse_without_app(name: str) -> None:
    if not (apps.ready and apps.is_installed("celery_pglock")):
        raise LockMisuse(f"{name} needs 'celery_pglock' in INSTALLED_APPS, and its migrations.")
