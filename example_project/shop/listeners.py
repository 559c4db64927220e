"""What Celery and celery_pglock tell about a task, on its way into the journal."""

from __future__ import annotations

from typing import Any

from celery import Task, current_task
from celery.signals import after_task_publish, task_postrun, task_prerun, task_retry, worker_ready
from django.dispatch import receiver

from celery_pglock import Preempted, advisory
from celery_pglock.backends import Stop
from celery_pglock.signals import (
    backend_stopped,
    lock_acquired,
    lock_conflict,
    lock_released,
    lock_skipped,
    locks_reported,
)
from example_project.shop.journal import is_of_the_shop, short, short_host, write, write_of


@after_task_publish.connect
def sent(headers: dict[str, Any], **_: Any) -> None:
    if is_of_the_shop(headers["task"]):
        write("sent", headers["task"], headers["id"])


@worker_ready.connect
def ready(sender: Any, **_: Any) -> None:
    write("ready", worker=short_host(sender.hostname))


@task_prerun.connect
def waits(task: Task, args: list[Any], kwargs: dict[str, Any], **_: Any) -> None:
    lock = task.lock_for(*args, **kwargs)
    # The lock's own signals come after the waiting, and a wait is worth watching.
    if lock.timeout and not lock.explain().would_run:
        write_of("waits", task, args, lock=lock.name, remark=in_the_way(lock))


@task_postrun.connect
def leaves(task: Task, state: str, retval: Any, **_: Any) -> None:
    write_of(state.lower(), task, remark=str(retval) if state == "FAILURE" else "")


@task_retry.connect
def stopped(sender: Task, reason: Any, **_: Any) -> None:
    if isinstance(reason.exc, Preempted):
        write_of("stopped", sender, remark=reason.exc.reason)


@receiver(backend_stopped)
def stops(stop: Stop, **_: Any) -> None:
    write("stops", "beat" if current_task else "somebody", remark=str(stop))


@receiver(locks_reported)
def reports(report: Any, **_: Any) -> None:
    write("reports", "beat", remark=report.totals())


@receiver(lock_acquired)
def holds(sender: Task, lock: advisory, waited: float, **_: Any) -> None:
    write_of("holds", sender, lock=lock.name, seconds=waited)


@receiver(lock_conflict)
def retries(sender: Task, lock: advisory, outcome: str, **_: Any) -> None:
    if outcome == "retried":
        write_of("retries", sender, lock=lock.name, remark=in_the_way(lock))


@receiver(lock_skipped)
def skips(sender: Task, lock: advisory, **_: Any) -> None:
    write_of("skips", sender, lock=lock.name, remark=in_the_way(lock))


@receiver(lock_released)
def frees(sender: Task, lock: advisory, held: float, **_: Any) -> None:
    write_of("frees", sender, lock=lock.name, seconds=held)


def in_the_way(lock: advisory) -> str:
    """Who holds this lock, or has been waiting for it for longer, in a few words."""
    found = lock.explain()
    rivals = [one for one in (*found.holders, *found.waiters) if not (lock.shared and one.shared)]
    if not rivals:
        return "was free again a moment later"
    first = rivals[0]
    verb = "is held by" if first.granted else "is waited for by"
    if not first.task_name:
        # A transaction-level lock is on a connection that tells no more than this.
        return f"{verb} task {first.task_id}"
    return f"{verb} {short(first.task_name)} on {short_host(first.worker)}"
