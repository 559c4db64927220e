"""Backends that are stopped, each only while it still is what was chosen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.db import DatabaseError, ProgrammingError, connections
from psycopg.errors import InsufficientPrivilege

from celery_pglock import labels, signals
from celery_pglock.audits import Audit, audit
from celery_pglock.looks import looking

logger = logging.getLogger(__name__)

# How long a terminated backend may take to end before it is told that it still does, in milliseconds.
PATIENCE = 1000

# Only what runs a statement can be cancelled: a backend that waits for its client would not even notice.
CANCEL = "CASE WHEN a.state IN ('active', 'fastpath function call') THEN pg_cancel_backend(a.pid) END"
TERMINATE = f"pg_terminate_backend(a.pid, {PATIENCE})"

# The one statement that reads the victim again and acts: its pid may belong to somebody else by now, its
# session work for another task, and the lock for which it was chosen may be free.
STOP = """
SELECT {act} FROM pg_stat_activity AS a
WHERE a.pid = %s AND a.backend_start = %s AND a.application_name IS NOT DISTINCT FROM %s
  AND a.pid <> pg_backend_pid()
  AND EXISTS (SELECT FROM {view} AS chosen WHERE chosen.id = ANY(%s))
"""

# As pg_signal_backend() decides in PostgreSQL's source.
PERMITTED = """
SELECT a.pid FROM pg_stat_activity AS a
JOIN pg_roles AS role ON role.oid = a.usesysid
JOIN pg_roles AS own ON own.rolname = current_user
WHERE a.pid = ANY(%s) AND (
    own.rolsuper
    OR NOT role.rolsuper AND (pg_has_role(role.oid, 'USAGE') OR pg_has_role('pg_signal_backend', 'USAGE'))
)
"""

CANCELLED = "cancelled"
TERMINATED = "terminated"
GONE = "gone"
IDLE = "idle"
STILL_ENDING = "still ending"
NOT_PERMITTED = "not permitted"

EXPLANATIONS: Final[Mapping[str, str]] = {
    CANCELLED: "its statement was asked to end",
    TERMINATED: "it has ended",
    GONE: "it had ended already, or was no longer what was chosen",
    IDLE: "it runs no statement that could be cancelled: only terminating it frees what it holds",
    STILL_ENDING: "it was asked to end, and had not yet",
    NOT_PERMITTED: (
        "this role may not: it must be a member of the backend's role, or of both pg_signal_backend and "
        "pg_read_all_stats"
    ),
}


@dataclass(frozen=True, slots=True)
class Victim:
    """A backend that was chosen, for rows of a view that must still be there when it is stopped.

    ``reason`` is for the audit, which has the rows otherwise. ``comes_back`` says whether the task that the
    backend works for goes back to its queue; ``None`` leaves that to the task.
    """

    pid: int
    backend_start: datetime | None
    application_name: str | None
    rows: tuple[Any, ...]
    reason: str = ""
    comes_back: bool | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """What became of one backend: ``outcome`` is a key of ``EXPLANATIONS``."""

    pid: int
    outcome: str

    @property
    def is_done(self) -> bool:
        """Whether it was stopped, as far as PostgreSQL tells."""
        return self.outcome in (CANCELLED, TERMINATED)

    def __str__(self) -> str:
        return f"backend {self.pid}: {self.outcome} ({EXPLANATIONS[self.outcome]})"


def permitted(pids: Iterable[int], using: str) -> set[int]:
    """Which of these backends of clients this role may stop."""
    with connections[using].cursor() as cursor:
        cursor.execute(PERMITTED, [list(pids)])
        return {pid for (pid,) in cursor.fetchall()}


def cancel(victims: Iterable[Victim], view: str, using: str) -> tuple[Stop, ...]:
    """Cancel the statement that each runs now."""
    return _stop(victims, view, using, "cancel", CANCEL, {True: CANCELLED, None: IDLE})


def terminate(victims: Iterable[Victim], view: str, using: str) -> tuple[Stop, ...]:
    """End the session of each; its locks are freed."""
    return _stop(victims, view, using, "terminate", TERMINATE, {True: TERMINATED, False: STILL_ENDING})


def _stop(
    victims: Iterable[Victim],
    view: str,
    using: str,
    action: str,
    act: str,
    outcomes: Mapping[bool | None, str],
) -> tuple[Stop, ...]:
    sql = STOP.format(act=act, view=connections[using].ops.quote_name(view))
    stops = []
    with audit(using) as entries:
        for victim in victims:
            number = entries.begin(
                action,
                victim.pid,
                victim.backend_start,
                labels.task_id_of(victim.application_name or ""),
                victim.comes_back,
                victim.reason or ", ".join(map(str, victim.rows)),
            )
            stop = Stop(victim.pid, _outcome(victim, sql, using, outcomes))
            _write_down(entries, number, stop)
            signals.backend_stopped.send_robust(sender=None, stop=stop, action=action, using=using)
            stops.append(stop)
    return tuple(stops)


def _write_down(entries: Audit, number: int, stop: Stop) -> None:
    try:
        entries.end(number, stop.outcome)
    except DatabaseError as error:
        # It is done: the others have their turn nonetheless.
        logger.warning("The outcome of act %s could not be written down: %s (%s)", number, stop, error)


def _outcome(victim: Victim, sql: str, using: str, outcomes: Mapping[bool | None, str]) -> str:
    # Without its start it cannot be told from whoever has its pid next.
    if victim.backend_start is None:
        return NOT_PERMITTED
    try:
        with looking(using), connections[using].cursor() as cursor:
            cursor.execute(
                sql, [victim.pid, victim.backend_start, victim.application_name, list(victim.rows)]
            )
            row = cursor.fetchone()
    except ProgrammingError as error:
        if not isinstance(error.__cause__, InsufficientPrivilege):
            raise
        return NOT_PERMITTED
    return GONE if row is None else outcomes.get(row[0], GONE)
