"""The toolbox as a project uses it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from typing_extensions import assert_type

from celery_pglock import (
    ACCESS_EXCLUSIVE,
    SHARE,
    Cancel,
    ExclusiveLock,
    LockNotAcquired,
    PrioritizeSideEffect,
    Raise,
    Return,
    ShareLock,
    Skip,
    Terminate,
    advisory,
    advisory_id,
    model,
    prioritize,
    timeout,
)
from celery_pglock.backends import Stop
from celery_pglock.holders import Explanation, Holder
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock, SkipCount
from celery_pglock.signals import (
    backend_stopped,
    lock_acquired,
    lock_conflict,
    lock_lost,
    lock_released,
    lock_skipped,
    locks_reported,
)

with advisory("import", timeout=0) as acquired:
    assert_type(acquired, bool)

lock = advisory("a", 7, (1, 2), shared=True, using="other", timeout=timedelta(seconds=1), side_effect=Raise)
assert_type(lock.acquire(), bool)
lock.release()
assert_type(lock.holders(), tuple[Holder, ...])
assert_type(lock.explain(), Explanation)
assert_type(lock.explain().would_run, bool)
assert_type(lock.holders()[0].since, datetime | None)
assert_type(advisory_id("a"), tuple[int, int])


@advisory("import:rows", timeout=None, side_effect=Skip(0))
def rows(path: str, *, limit: int = 10) -> int:
    return limit


@timeout(seconds=1, milliseconds=500)
def quick(name: str) -> list[str]:
    return [name]


@prioritize(interval=0.5, timeout=timedelta(seconds=3), side_effect=Terminate(wait_duration__gte="5 seconds"))
def urgent(number: int) -> str:
    return str(number)


assert_type(rows("path", limit=3), int)
assert_type(quick("name"), list[str])
assert_type(urgent(1), str)

with timeout(timedelta(seconds=1), using="other"), prioritize(side_effect=Cancel):
    pass

with transaction.atomic():
    assert_type(model(SkipCount, "shop.Order", mode=SHARE, timeout=0, side_effect=Return), bool)
    assert_type(model(SkipCount, mode=ACCESS_EXCLUSIVE, side_effect=Raise()), bool)

with ExclusiveLock("a", 2, using="default") as exclusive:
    assert_type(exclusive, ExclusiveLock)
    assert_type(exclusive.locked(), bool)
with ShareLock() as share:
    assert_type(share, ShareLock)
assert_type(ExclusiveLock("a").acquire(blocking=False), bool)


class OnlyTold(PrioritizeSideEffect):
    def worker(self, blocked_locks: Any) -> None:
        print(blocked_locks.pids())  # noqa: T201 - whatever a project does with it


on_tables = PGLock.objects.on("shop.Order", SkipCount).filter(granted=True).pid(4711)
assert_type(on_tables.cancel_activity(), tuple[Stop, ...])
assert_type(PGLock.objects.config("stuck", pids=[1]).terminate_activity(), tuple[Stop, ...])
assert_type(PGActivity.objects.pid(4711, 4712).terminate(), tuple[Stop, ...])
assert_type(BlockedPGLock.objects.using("other").cancel_blocking_activity(), tuple[Stop, ...])
assert_type(PGLock.objects.using("other").on(SkipCount).get(), PGLock)
for found in PGLock.objects.on(SkipCount):
    assert_type(found, PGLock)
    assert_type(found.mode, str)
    assert_type(found.granted, bool)
    assert_type(found.name, str)
    assert_type(found.wait_start, datetime | None)
    assert_type(found.wait_duration, timedelta | None)
    assert_type(found.activity, PGActivity | None)
for wait in BlockedPGLock.objects.all():
    assert_type(wait.blocking_activity, PGActivity | None)
    assert_type(wait.relation, int | None)
assert_type(PGActivity.objects.get().id, int)
assert_type(PGActivity.objects.get().query, str)
assert_type(PGActivity.objects.get().application_name, str | None)


def count(sender: Any, **_: Any) -> None: ...


for signal in (
    backend_stopped,
    lock_acquired,
    lock_conflict,
    lock_lost,
    lock_released,
    lock_skipped,
    locks_reported,
):
    signal.connect(count)

try:
    rows("path")
except LockNotAcquired as error:
    assert_type(error.reason, str)

rows(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
quick(nam="name")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
urgent("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
advisory("a", timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
advisory(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
model(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ShareLock("a").aquire()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
PrioritizeSideEffect()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
