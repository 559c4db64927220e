"""Locked tasks as a project writes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery import Celery
from celery.result import AsyncResult
from typing_extensions import assert_type

from celery_pglock import (
    ALL_ARGUMENTS,
    AdvisoryTask,
    LockLost,
    LockNotAcquired,
    Preempted,
    Raise,
    Retry,
    SideEffect,
    Skip,
    XactAdvisoryTask,
    advisory,
    install,
    lock_for,
)
from celery_pglock.bootsteps import PrioritizeCriticalTasks
from celery_pglock.models import SkipCount
from celery_pglock.schedules import beat_entries
from celery_pglock.side_effects import Conflict
from celery_pglock.tasks import prioritize_critical_tasks, report_locks

app: Celery[Any] = Celery("consumer")


@app.task(base=AdvisoryTask, lock_key="report:{customer_id}", lock_side_effect=Skip())
def nightly_report(customer_id: int) -> None: ...


@app.task(base=XactAdvisoryTask, lock_by=("account",), lock_timeout=timedelta(seconds=5), lock_shared=True)
def move(account: str, amount: int) -> int:
    return amount


@app.task(bind=True, base=AdvisoryTask, lock_by=ALL_ARGUMENTS, lock_limit=3, lock_strict=True)
def guarded(self: AdvisoryTask, key: str) -> None:
    self.lock.check()
    assert_type(self.lock.name, str)
    timeline, number = self.lock.token
    assert_type(timeline, int)
    assert_type(number, int)
    assert_type(self.lock.guard(SkipCount.objects.all()).update(count=number), int)


class LoudlySkipped(SideEffect):
    def on_conflict(self, conflict: Conflict) -> Any:
        assert_type(conflict.waited, float)
        assert_type([holder.pid for holder in conflict.holders], list[int | None])
        if conflict.attempt > 3:
            raise conflict.error()
        return conflict.skip("skipped") if conflict.holders else conflict.retry(2)


class SlowLane(AdvisoryTask):
    lock_timeout = 5
    lock_limit = 2
    lock_side_effect = Retry(countdown=timedelta(seconds=1), maximum=60, deadline=None, then=Raise)
    lock_priority = 1


@app.task(base=SlowLane, lock_side_effect=LoudlySkipped())
def slow(key: str) -> str:
    return key


class EveryFewSeconds(PrioritizeCriticalTasks):
    interval = timedelta(seconds=5)


assert_type(nightly_report, AdvisoryTask)
assert_type(slow, SlowLane)
assert_type(nightly_report.lock_for(customer_id=42), advisory)
assert_type(lock_for(nightly_report, 42), advisory)
assert_type(nightly_report.lock_for(42).is_held(), bool)
sent: AsyncResult[Any] = nightly_report.delay(42)
sent = move.delay_on_commit("a", 1)
install(app, {"third.party.*": {"lock_by": ("pk",), "lock_side_effect": Skip()}, "third.party.free": None})
assert_type(beat_entries(report_locks=60), dict[str, dict[str, Any]])
assert_type(report_locks, AdvisoryTask)
assert_type(prioritize_critical_tasks, AdvisoryTask)


def told(error: LockNotAcquired | LockLost | Preempted) -> str:
    if isinstance(error, LockNotAcquired):
        assert_type(error.holders, tuple[str, ...])
        assert_type(error.waited, float)
    return error.lock


Skip(chains="stop")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Retry(countdown="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
install(app, ["third.party.*"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
nightly_report.lock_fro(42)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
