"""The entries by which beat sends the tasks of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from celery_pglock.config import check_alias
from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockMisuse


def beat_entries(
    *,
    report_locks: Duration = 60,
    prioritize_critical_tasks: Duration = None,
    queue: str | None = None,
    using: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Entries for ``CELERY_BEAT_SCHEDULE``, or for ``app.conf.beat_schedule``.

    Of each task the interval between two runs, more than 0 seconds; ``None`` leaves the task out. What was
    not begun when the next run is due expires. ``using`` is an alias in ``DATABASES``; entries for several
    have different names.
    """
    if not (queue is None or (isinstance(queue, str) and queue)):
        raise LockMisuse(f"beat_entries(queue=...) must be the name of a queue or None, not {queue!r}.")
    if using is not None:
        check_alias(using, "beat_entries(using=...)")
    intervals = {"report_locks": report_locks, "prioritize_critical_tasks": prioritize_critical_tasks}
    of_alias = f" of {using}" if using else ""
    return {
        f"celery_pglock.{name}{of_alias}": _entry(name, interval, queue, using)
        for name, interval in intervals.items()
        if interval is not None
    }


def entries_of_ours(app: Any) -> list[tuple[str, str, str | None]]:
    """Of the app's entries for tasks of ours: the name, the task's name, and the alias if one is given."""
    found = []
    for name, entry in (app.conf.beat_schedule or {}).items():
        # An entry may be written as a dict or made as a ScheduleEntry.
        given = entry if isinstance(entry, Mapping) else vars(entry)
        if str(given.get("task")).startswith("celery_pglock."):
            found.append((name, given["task"], (given.get("kwargs") or {}).get("using")))
    return found


def _entry(name: str, interval: Duration, queue: str | None, using: str | None) -> dict[str, Any]:
    every = seconds(interval, f"beat_entries({name}=...)")
    if not every or math.isinf(every):
        raise LockMisuse(
            f"beat_entries({name}=...) must be more than 0 seconds, or None to leave the task out, not "
            f"{interval!r}."
        )
    return {
        "task": f"celery_pglock.{name}",
        "schedule": every,
        "kwargs": {} if using is None else {"using": using},
        "options": {"expires": every} if queue is None else {"expires": every, "queue": queue},
    }
