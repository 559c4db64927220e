"""Sessions that hold locks and wait for them, without a thread for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.db import connections
from psycopg.pq import TransactionStatus

from celery_pglock.models import BlockedPGLock
from tests.conftest import Rival, wait_until


class Bystander(Rival):
    """A session of its own, which may send a statement that waits, and go on."""

    def __init__(self, alias: str, role: str = "", **options: Any) -> None:
        self.alias = alias
        parameters = connections[alias].get_connection_params()
        parameters |= {"cursor_factory": None, "context": None, "autocommit": True, **options}
        if role:
            parameters |= {"user": role}
        self.connection = psycopg.connect(**parameters)
        self.pid = self.connection.info.backend_pid

    def does(self, *statements: str) -> None:
        for statement in statements:
            self.connection.execute(statement)

    def sends(self, sql: str) -> None:
        """Send it without waiting for the answer."""
        self.connection.pgconn.send_query(sql.encode())

    def waits(self, sql: str) -> None:
        """Send it, and return when it waits for a lock."""
        self.sends(sql)
        with connections[self.alias].cursor() as cursor:
            wait_until(lambda: self._is_waiting(cursor), sql)

    def _is_waiting(self, cursor: Any) -> bool:
        # For an instant it waits, and PostgreSQL has not written down since when.
        cursor.execute("SELECT FROM pg_locks WHERE waitstart IS NOT NULL AND pid = %s", [self.pid])
        return bool(cursor.fetchall())

    def answers(self) -> str:
        """What came of what was sent: empty, or the error's SQLSTATE."""
        pgconn = self.connection.pgconn
        state = ""
        while result := pgconn.get_result():
            state = (result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) or b"").decode() or state
        return state

    @property
    def is_busy(self) -> bool:
        pgconn = self.connection.pgconn
        pgconn.consume_input()
        return bool(pgconn.is_busy())

    @property
    def has_failed(self) -> bool:
        return self.connection.pgconn.transaction_status == TransactionStatus.INERROR

    @property
    def in_transaction(self) -> bool:
        return self.connection.pgconn.transaction_status != TransactionStatus.IDLE


@contextmanager
def bystanders(alias: str = "default") -> Iterator[Any]:
    """Gives what makes them; all are gone at the end."""
    everybody: list[Bystander] = []

    def one(role: str = "", **options: Any) -> Bystander:
        everybody.append(Bystander(alias, role, **options))
        return everybody[-1]

    try:
        yield one
    finally:
        _send_away(alias, everybody)


def _send_away(alias: str, everybody: list[Bystander]) -> None:
    pids = [one.pid for one in everybody]
    with connections[alias].cursor() as cursor:
        # All at once: hundreds one after the other would take as many tenths of a second.
        cursor.execute("SELECT count(pg_terminate_backend(pid)) FROM unnest(%s::int[]) AS pid", [pids])
        wait_until(lambda: not _are_here(cursor, pids), "the bystanders have gone")
    for one in everybody:
        one.connection.close()


def _are_here(cursor: Any, pids: list[int]) -> bool:
    cursor.execute("SELECT FROM pg_stat_activity WHERE pid = ANY(%s)", [pids])
    return bool(cursor.fetchall())


def waits() -> set[tuple[int, int | None]]:
    """Who waits for whom."""
    return set(BlockedPGLock.objects.values_list("activity_id", "blocking_activity_id"))
