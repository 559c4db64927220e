"""What becomes of whoever uses a backend that is stopped."""

from __future__ import annotations

from typing import Any, Final

from celery_pglock import labels

# What pg_cancel_backend() ends.
RUNS: Final = ("ACTIVE", "FASTPATH_FUNCTION_CALL")
CLIENT: Final = "CLIENT_BACKEND"

NOT_READABLE = "PostgreSQL does not tell this role what it does: it may be refused, or have ended."
RUNS_NOTHING = "It runs no statement, so nothing happens to it: only terminating it frees what it holds."
FAILS = "The statement that it runs fails, with all of its transaction unless its code catches the error."
LOSES_SESSION = (
    "Its session ends: its transaction is rolled back, all of its locks are freed, and the next query of its "
    "code fails."
)
NOT_OF_A_CLIENT = "It is PostgreSQL's own ({}): the server starts it again when it is due."
DOES_NOT_BEGIN = "If it still waits for its lock, it does not begin, and its message comes back later."
WAIT_FAILS = "The wait of {task} fails: it does not begin, and its message comes back later."
LOCKS_ARE_FREED = "All locks of its session are freed at once, and others may get them."
TASK_IS_TOLD = (
    "{task} is told that it lost them: as its option lock_on_lost says it is interrupted by LockLost, where "
    "its worker can do that, or runs to its end and then fails or succeeds."
)
CODE_IS_TOLD = "The code that holds them runs on, and learns of it by LockLost at the end of its block."
TASK_FAILS = (
    "{task} is hit by that, and fails unless it handles the error; it runs again only if it is retried for "
    "such errors."
)


def consequence(activity: Any, task_name: str, *, terminates: bool) -> str:
    """What happens, in a few sentences; ``activity`` is of ``PGActivity``, or ``None`` if it is not seen."""
    if activity is None or activity.state is None:
        return NOT_READABLE
    if activity.backend_type not in (CLIENT, None):
        return NOT_OF_A_CLIENT.format(activity.backend_type.lower().replace("_", " "))
    if not terminates and activity.state not in RUNS:
        return RUNS_NOTHING
    kind, _, task_id = (activity.application_name or "").partition(":")
    session = LOSES_SESSION if terminates else FAILS
    if kind == labels.LOCK_SESSION and task_id:
        sentences = [LOCKS_ARE_FREED, TASK_IS_TOLD, DOES_NOT_BEGIN] if terminates else [WAIT_FAILS]
    elif kind == labels.LOCK_SESSION:
        sentences = [LOCKS_ARE_FREED, CODE_IS_TOLD] if terminates else [FAILS]
    elif kind == labels.WORK_CONNECTION and task_id:
        sentences = [session, TASK_FAILS]
    else:
        sentences = [session]
    return " ".join(sentences).format(task=f"Task {task_name or 'of an unknown name'} [{task_id}]")


def is_of_task(activity: Any) -> bool:
    """Whether a backend works for a task, by its own words."""
    return bool(activity and labels.task_id_of(activity.application_name or ""))
