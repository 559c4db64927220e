"""How a lock session speaks with its server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from django.db import DatabaseError, OperationalError
from psycopg.errors import (
    DeadlockDetected,
    InvalidParameterValue,
    LockNotAvailable,
    OutOfMemory,
    UndefinedTable,
)

from celery_pglock import labels, markers
from celery_pglock.config import current
from celery_pglock.errors import LockMisuse
from celery_pglock.keys import Key
from celery_pglock.labels import NOBODY, Holding, Owner
from celery_pglock.lifelines import WHO_ANSWERS, Lifeline
from celery_pglock.raw_connections import MARK, pooled
from celery_pglock.statements import Statement

TIMED_OUT = "lock_timeout ran out"

# PostgreSQL's own refusals: busy (55P03) and deadlock (40P01). They leave the session as it was.
REFUSALS: Final[dict[type[Any], str]] = {
    LockNotAvailable: TIMED_OUT,
    DeadlockDetected: "PostgreSQL chose it as the victim of a deadlock",
}

NAME = "set_config('application_name', %s, false)"

# An error on purpose, as no timeout can be set to this. PostgreSQL evaluates columns in their order.
SOMEBODY_ELSE = "the session of somebody else"
UNLESS_MARKED = (
    f"CASE WHEN current_setting('{MARK}', true) IS DISTINCT FROM %s"
    f" THEN set_config('lock_timeout', '{SOMEBODY_ELSE}', true) END"
)

NAME_OF_NOBODY: Final = labels.application_name(labels.LOCK_SESSION, "")
LABEL_OF_NOBODY: Final = f"{labels.comment(NOBODY, (), show_names=False)} "


class Refused(Exception):
    """PostgreSQL would not wait any longer; the message says why, and nothing was gained."""


class NoRoom(OperationalError):
    """The server's table of locks is full; the session, and what it held before, are as they were."""


class Voice:
    """Each statement with a label of whom the session works for, and refused by any other session.

    ``mark`` is what a session behind a pooler is known by, and empty where there is no pooler.
    """

    def __init__(self, line: Lifeline, owner: Owner, mark: str) -> None:
        self._line = line
        self._mark = mark
        self._marker: Key | None = None
        self._begin_to_work_for(owner)
        # What the server calls the session by now, as it was told when it was opened.
        self._name = self._name_of_owner

    def works_for(self, owner: Owner) -> None:
        if owner is not self.owner:
            self._begin_to_work_for(owner)

    def _begin_to_work_for(self, owner: Owner) -> None:
        self.owner = owner
        self._name_of_owner = application_name(owner)
        self._beginning = labels.beginning(owner)

    def guarded(self, statement: Statement) -> Statement:
        """The statement, made to fail before it does anything on a session that is not ours."""
        return statement.after(UNLESS_MARKED, self._mark) if self._mark else statement

    def telling(self, statement: Statement) -> Statement:
        """The guarded statement, which tells of a critical task before it does anything else."""
        if self.owner.priority and self._marker is None:
            self._marker = markers.marker(self.owner.priority)
            statement = statement.after(markers.TAKE, *self._marker.arguments)
        return self.guarded(statement)

    def no_longer_telling(self) -> Statement | None:
        """What makes the session one of no critical task; ``None`` if it is not."""
        if self._marker is None:
            return None
        marker, self._marker = self._marker, None
        return self.guarded(Statement((markers.GIVE_BACK,), marker.arguments))

    def answer(
        self, statement: Statement, holdings: Sequence[Holding], *, wait: float | None = 0
    ) -> Sequence[Any]:
        """The one row of a statement after which the session has these.

        Raises ``Refused`` where PostgreSQL did, and ``NoRoom``.
        """
        name = self._name_of_owner if holdings else NAME_OF_NOBODY
        is_new = name != self._name
        if is_new:
            statement = statement.after(NAME, name)
        sql = f"{statement.opening}SELECT {statement.select}"
        parameters = (*statement.opening_parameters, *statement.parameters)
        # Behind a pooler the next statement may meet a session in which nothing was prepared.
        ask = self._line.ask if self._mark or statement.opening else self._line.ask_again
        try:
            row = ask(sql, parameters, label=self._label(holdings), wait=wait)[0]
        except DatabaseError as error:
            if reason := REFUSALS.get(type(error.__cause__)):
                raise Refused(reason) from None
            if isinstance(error.__cause__, OutOfMemory):
                raise NoRoom(*error.args) from error.__cause__
            if isinstance(error.__cause__, InvalidParameterValue) and SOMEBODY_ELSE in str(error):
                raise pooled(self._line.alias) from None
            if isinstance(error.__cause__, UndefinedTable):
                raise no_table(self._line.alias) from None
            raise
        if is_new:
            self._name = name
            return row[1:]
        return row

    def rows(
        self, sql: str, parameters: Sequence[object], holdings: Sequence[Holding]
    ) -> list[tuple[Any, ...]]:
        """The rows of a statement that changes nothing of what the session has, which is this."""
        return self._line.ask(sql, parameters, label=self._label(holdings))

    def be_heard(self, holdings: Sequence[Holding]) -> None:
        """Say something, with the label of what the session has by now."""
        self._line.ask_who_answers(self._label(holdings))

    def beat(self, holdings: Sequence[Holding]) -> str:
        """What it says to be heard at all."""
        return f"{self._label(holdings)}{WHO_ANSWERS}"

    def _label(self, holdings: Sequence[Holding]) -> str:
        if not holdings:
            return LABEL_OF_NOBODY
        show_names = current().SHOW_NAMES
        return f"{labels.comment_after(self._beginning, holdings, show_names=show_names)} "


def no_table(alias: str) -> LockMisuse:
    """The error that tells how to get the table of strict locks."""
    return LockMisuse(
        f"Strict locks keep a row for each key, and alias {alias!r} has no table for them: with "
        f"'celery_pglock' in INSTALLED_APPS run manage.py migrate --database={alias}."
    )


def application_name(owner: Owner) -> str:
    """What the session is called while it works for this owner."""
    return labels.application_name(labels.LOCK_SESSION, owner.task_id)
