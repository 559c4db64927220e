"""The reports that are kept, for as long as they are."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from django.db import router

from celery_pglock import config
from celery_pglock.durations import seconds
from celery_pglock.looks import FAILURES, looking
from celery_pglock.model_locks import model
from celery_pglock.models import LockReport, LossCount, SkipCount
from celery_pglock.modes import ROW_EXCLUSIVE
from celery_pglock.reports import WINDOW, Report, not_done
from celery_pglock.side_effects import Raise

# What is left of a long backlog is for the next reports: each statement stays a short one.
BATCH = 1000
MOST_BATCHES = 10


def keep(report: Report) -> tuple[str, ...]:
    """Drop what is older than ``CELERY_PGLOCK["RETENTION"]``, and write the report down.

    Waits for nothing; tells what could not be done.
    """
    undone: list[str] = []
    if (oldest := _oldest(report)) is not None:
        counts = router.db_for_write(SkipCount)
        # The next report wants to tell of these hours, too.
        oldest_hour = min(oldest, report.at - WINDOW)
        _drop(undone, report.using, LockReport, at__lt=oldest)
        _drop(undone, counts, SkipCount, hour__lt=oldest_hour)
        _drop(undone, counts, LossCount, hour__lt=oldest_hour)
    write = partial(_write, report, unread=[*report.unread, *undone])
    _do(undone, "the report is not in the history", report.using, LockReport, write)
    return tuple(undone)


def _oldest(report: Report) -> datetime | None:
    retention = seconds(config.current().RETENTION, "CELERY_PGLOCK['RETENTION']")
    if retention is None:
        return None
    try:
        return report.at - timedelta(seconds=retention)
    except OverflowError:
        return None


def _do(undone: list[str], what: str, alias: str, table: type[Any], do: Callable[[], int]) -> int:
    """What was done while nobody else keeps the table for himself; 0 where somebody does."""
    try:
        with looking(alias):
            model(table, mode=ROW_EXCLUSIVE, timeout=0, using=alias, side_effect=Raise())
            return do()
    except FAILURES as error:
        undone.append(not_done(what, error))
        return 0


def _drop(undone: list[str], alias: str, table: type[Any], **old: datetime) -> None:
    what = f"what is old stays in {table._meta.db_table}"
    for _ in range(MOST_BATCHES):
        if _do(undone, what, alias, table, partial(_drop_batch, alias, table, old)) < BATCH:
            break


def _drop_batch(alias: str, table: type[Any], old: dict[str, datetime]) -> int:
    rows = table.objects.using(alias).filter(**old)
    # Somebody may be counting in one of them.
    chosen = list(rows.select_for_update(skip_locked=True).values_list("pk", flat=True)[:BATCH])
    rows.filter(pk__in=chosen).delete()
    return len(chosen)


def _write(report: Report, unread: list[str]) -> int:
    LockReport.objects.using(report.using).create(
        at=report.at,
        held=report.held,
        waiting=report.waiting,
        skipped=report.skipped,
        longest_held=report.longest_held,
        longest_wait=report.longest_wait,
        findings=list(report.findings),
        unread=unread,
    )
    return 1
