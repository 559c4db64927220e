"""What a worker answers to ``celery inspect locks``."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

from django.apps import apps
from django.db import connections

from celery_pglock import config
from celery_pglock.looks import leave_the_pool, looking
from celery_pglock.printed_texts import in_json, one_line

# In seconds: meanwhile the worker's main process does nothing else.
PATIENCE = 5.0

COLUMNS = (
    "activity_id",
    "name",
    "classid",
    "objid",
    "objsubid",
    "task_name",
    "task_id",
    "mode",
    "granted",
    "since",
    "wait_duration",
)

_asking: list[Thread] = []


def register() -> None:
    """Let workers, and the command that asks them, know of it; doing it again changes nothing."""
    # It is much to import for a process that is no worker.
    from celery.worker.control import inspect_command

    inspect_command(name="locks", help="List the locks that tasks of this worker hold or wait for.")(locks)


def locks(state: Any, **_: Any) -> Any:
    """The locks in ``CELERY_PGLOCK["USING"]`` whose labels name this worker; an error is answered as one.

    Its processes know of their own locks only; the database knows of all.
    """
    try:
        return _apart(lambda: _locks_of(str(state.hostname)))
    except Exception as error:
        return _error(error)


def _apart(ask: Callable[[], Any]) -> Any:
    """Ask in a thread, which has Django connections of its own: a database that hangs stops no worker."""
    if any(thread.is_alive() for thread in _asking):
        raise TimeoutError("The database has not answered the inquiry before this one yet.")
    answers: list[Any] = []

    def answer() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            answers.append(_error(error))

    thread = Thread(target=answer, name="celery_pglock_inspection", daemon=True)
    thread.start()
    _asking[:] = [thread]
    thread.join(PATIENCE)
    if not answers:
        raise TimeoutError(f"The database did not answer within {PATIENCE:g} s.")
    return answers[0]


def _error(error: Exception) -> dict[str, str]:
    return {"error": one_line(error) or type(error).__name__}


def _locks_of(worker: str) -> list[dict[str, Any]]:
    alias = config.current().USING
    config.check_alias(alias, "CELERY_PGLOCK['USING']")
    # By its name, because tasks, whose hooks make this known, never import the models.
    rows = apps.get_model("celery_pglock", "PGLock").objects.using(alias).filter(worker=worker)
    found = rows.order_by("granted", "name", "pk")
    # A thread that ends would not give it back.
    leave_the_pool(connections[alias])
    try:
        with looking(alias):
            return [_in_json(row) for row in found.values(*COLUMNS)]
    finally:
        connections[alias].close()


def _in_json(row: dict[str, Any]) -> dict[str, Any]:
    numbers = (row["objsubid"], row["classid"], row["objid"])
    return {
        "key": row["name"] or ":".join(map(str, numbers)),
        "task_name": row["task_name"],
        "task_id": row["task_id"],
        "mode": row["mode"],
        "granted": row["granted"],
        "since": in_json(row["since"]) if row["granted"] else None,
        "wait_duration": in_json(row["wait_duration"]),
        "pid": row["activity_id"],
    }
