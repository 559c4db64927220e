"""Writing the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from celery import Task
from django.db import OperationalError, connections

from example_project.shop.models import Entry


def write(what: str, task: str = "", task_id: str = "", **fields: Any) -> None:
    """Add an entry, committed at once whatever becomes of the task's own transaction."""
    entry = Entry(what=what, task=short(task), task_id=task_id, **fields)
    try:
        entry.save(using="journal")
    except OperationalError:
        # It was ended together with the task that worked on it.
        connections["journal"].close()
        entry.save(using="journal")


def write_of(what: str, task: Task, args: Sequence[Any] | None = None, **fields: Any) -> None:
    """Add an entry about the run that this task is in."""
    if not is_of_the_shop(task.name):
        return
    request = task.request
    args = request.args if args is None else args
    write(what, task.name, request.id, args=list(args or ()), worker=short_host(request.hostname), **fields)


@contextmanager
def work(task: Task, *resources: str) -> Iterator[None]:
    """Say when the work on these begins and ends; it is what the invariants are checked from."""
    for resource in resources:
        write_of("starts", task, resource=resource)
    try:
        yield
    finally:
        for resource in resources:
            write_of("ends", task, resource=resource)


def is_of_the_shop(task_name: str) -> bool:
    """Whether it does the shop's work; beat also sends tasks that look after the others."""
    return not task_name.startswith("celery_pglock.")


def short(task_name: str) -> str:
    """The task's name without its module."""
    return task_name.rpartition(".")[2]


def short_host(hostname: str | None) -> str:
    """The worker's name without its machine."""
    return (hostname or "").partition("@")[0]
