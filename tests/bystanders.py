"""Sessions that hold locks and wait for them, without a thread for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
        cursor.execute("SELECT FROM pg_locks WHERE NOT granted AND pid = %s", [self.pid])
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
    with ExitStack() as stack:

        def one(role: str = "", **options: Any) -> Bystander:
            somebody = Bystander(alias, role, **options)
            stack.callback(_gone, somebody)
            return somebody

        yield one


def _gone(somebody: Bystander) -> None:
    with connections[somebody.alias].cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [somebody.pid])
    somebody.connection.close()


def waits() -> set[tuple[int, int | None]]:
    """Who waits for whom."""
    return set(BlockedPGLock.objects.values_list("activity_id", "blocking_activity_id"))
