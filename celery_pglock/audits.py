"""What is done to backends, written down before it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from celery_pglock.looks import apart

TABLE: Final = "celery_pglock_act"
OUTCOMES: Final = "celery_pglock_outcome"

LONGEST_TEXT = 200

# What stays of the query is a hash: its text may hold what a reader of the audit must not see.
BEGIN = f"""
INSERT INTO {TABLE} (
    at, through, by, action, task_id, comes_back, reason, pid, backend_start, role, application_name,
    client_addr, query_hash
)
SELECT clock_timestamp(), %s, %s, %s, %s, %s, %s, chosen.pid, chosen.backend_start, a.usename,
       a.application_name, host(a.client_addr), md5(a.query)
FROM (SELECT %s::int AS pid, %s::timestamptz AS backend_start) AS chosen
LEFT JOIN pg_stat_activity AS a ON a.pid = chosen.pid AND a.backend_start = chosen.backend_start
RETURNING id
"""
END = f"INSERT INTO {OUTCOMES} (act_id, at, outcome) VALUES (%s, clock_timestamp(), %s)"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, and through which door."""

    through: str = "code"
    by: str = ""


SOME_CODE: Final = Actor()

_actor: ContextVar[Actor] = ContextVar("celery_pglock_actor", default=SOME_CODE)


@contextmanager
def acting(through: str, by: str = "") -> Iterator[None]:
    """What is done in the block is written down as done by this person or task, through this door."""
    token = _actor.set(Actor(through, by[:LONGEST_TEXT]))
    try:
        yield
    finally:
        _actor.reset(token)


class Audit:
    """The audit of one batch of acts; each entry is committed before ``begin`` or ``end`` returns."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def begin(
        self,
        action: str,
        pid: int,
        backend_start: Any,
        task_id: str,
        comes_back: bool | None,  # noqa: FBT001 - a column among columns
        reason: str,
    ) -> int:
        """Write down what is about to be done; answers the number of the entry."""
        actor = _actor.get()
        row = [actor.through, actor.by, action, task_id, comes_back, reason[:LONGEST_TEXT]]
        with self._connection.cursor() as cursor:
            cursor.execute(BEGIN, [*row, pid, backend_start])
            number: int = cursor.fetchone()[0]
        return number

    def end(self, number: int, outcome: str) -> None:
        """Write down what became of it."""
        with self._connection.cursor() as cursor:
            cursor.execute(END, [number, outcome])


@contextmanager
def audit(alias: str) -> Iterator[Audit]:
    """An audit in this database, on a connection of its own: it stays, whatever is rolled back around it."""
    with apart(alias) as connection:
        yield Audit(connection)
