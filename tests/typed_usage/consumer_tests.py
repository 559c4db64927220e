"""Tests of locked tasks as a project writes them."""

from __future__ import annotations

from consumer_tasks import nightly_report
from typing_extensions import assert_type

from celery_pglock import advisory
from celery_pglock.conflicts import TaskConflict
from celery_pglock.testing import (
    LocksLeftBehind,
    assert_raised,
    assert_ran,
    assert_retried,
    assert_skipped,
    close_lock_sessions,
    held_elsewhere,
    lock_free,
    locks_off,
)

with held_elsewhere(nightly_report.lock_for(42), "key"), assert_skipped(nightly_report) as skipped:
    assert_type(skipped, list[TaskConflict])
with assert_ran(nightly_report, times=2) as locks:
    assert_type(locks, list[advisory])
with assert_retried("consumer_tasks.nightly_report") as retried, assert_raised(nightly_report) as raised:
    assert_type(retried[0].key, str)
    assert_type(raised[0].waited, float)
assert_type(lock_free("key", shared=True, using="other"), bool)
with locks_off():
    close_lock_sessions(left_by="consumer")


@locks_off()
def unlocked(number: int) -> int:
    return number


assert_type(unlocked(1), int)
warning: type[Warning] = LocksLeftBehind

assert_ran(nightly_report, time=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lock_free(key="key")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
