"""What log records about a task's lock carry beside their text."""

from __future__ import annotations

from typing import Any

from celery_pglock.side_effects import Conflict


def about(what: str, task: Any, request: Any, lock: str, **facts: Any) -> dict[str, Any]:
    """The ``extra`` of a record, of values that JSON knows; ``what`` happened to which lock of which task.

    All is in one attribute: Celery's own formatter sets ``task_name`` and ``task_id`` of records.
    """
    identity = {"what": what, "lock": lock, "task_name": task.name, "task_id": request.id}
    return {"pglock": {**identity, **facts}}


def about_conflict(what: str, conflict: Conflict, **facts: Any) -> dict[str, Any]:
    """The same of a conflict, with who holds the lock."""
    return about(
        what,
        conflict.task,
        conflict.request,
        conflict.key,
        **facts,
        attempt=conflict.attempt,
        waited=conflict.waited,
        holders=[holder.as_dict() for holder in conflict.holders],
    )
