"""The tasks, and the base classes of tasks, for ``from celery_pglock.tasks import ...``."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from celery import shared_task
from django.apps import apps

from celery_pglock import config, running_tasks, signals
from celery_pglock.errors import LockMisuse
from celery_pglock.side_effects import Skip
from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask

__all__ = ["AdvisoryTask", "XactAdvisoryTask", "report_locks"]

logger = logging.getLogger(__name__)


@shared_task(
    bind=True,
    base=AdvisoryTask,
    name="celery_pglock.report_locks",
    ignore_result=False,
    lock_by=("using",),
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
    _refuse_without_app("report_locks")
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


def _refuse_without_app(name: str) -> None:
    if not (apps.ready and apps.is_installed("celery_pglock")):
        raise LockMisuse(f"celery_pglock.{name} needs 'celery_pglock' in INSTALLED_APPS, and its migrations.")
