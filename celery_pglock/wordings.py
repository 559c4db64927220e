"""Rows of our views in words."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from celery_pglock import labels
from celery_pglock.keys import Key
from celery_pglock.printed_texts import one_line

SESSIONS = {labels.LOCK_SESSION: "lock session", labels.WORK_CONNECTION: "work connection"}

# What pg_stat_activity has where this role may not read a query.
UNREADABLE = "<insufficient privilege>"

PREPARED = "a transaction that was prepared (see pg_prepared_xacts)"


def lock(row: Any) -> str:
    """A lock by its type, its mode, and its name, table or number."""
    return " ".join([row.type, row.mode, *filter(None, [subject(row)])])


def subject(row: Any) -> str:
    """What a lock is on: its name, its table or its number; empty for what has none of them."""
    if row.name:
        return repr(row.name)
    if row.rel_name:
        return one_line(row.rel_name)
    if row.type == "ADVISORY":
        arguments = Key(row.objsubid, row.classid, row.objid, "").arguments
        return str(arguments[0]) if len(arguments) == 1 else str(arguments)
    return ""


def backend(activity: Any, task_name: str = "", task_id: str = "") -> str:
    """A backend by its task, or by what it calls itself, with its state."""
    if activity is None:
        return "a backend that is not of this database, or has ended"
    task_id = task_id or labels.task_id_of(activity.application_name or "")
    if task_id:
        who = f"{task_name or 'task'} [{task_id}]"
    else:
        who = activity.application_name or activity.backend_type or "unnamed"
    since = in_state(activity)
    state = activity.state or "state not known"
    return f"{one_line(who)}, {state}" + (f" for {one_line(since)}" if since is not None else "")


def session(activity: Any) -> str:
    """What a session is to its task, whose id stands elsewhere, or what it calls itself."""
    kind, _, task_id = (activity.application_name or "").partition(":")
    return (task_id and SESSIONS.get(kind)) or activity.application_name or activity.backend_type or ""


def in_state(activity: Any) -> timedelta | None:
    """How long a backend has been in its state; ``None`` if that may not be read."""
    if activity is None or None in (activity.start, activity.duration, activity.state_change):
        return None
    found: timedelta = activity.start + activity.duration - activity.state_change
    return found
