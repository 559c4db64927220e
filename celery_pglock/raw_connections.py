"""Connections of psycopg's own, apart from Django's."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
from django.db import OperationalError, connections
from psycopg.pq import TransactionStatus

from celery_pglock import undisturbed
from celery_pglock.config import check_alias, current
from celery_pglock.durations import milliseconds
from celery_pglock.errors import LockMisuse

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 1.0

# Says which lock session a server session belongs to. A pid would not tell: lock sessions that a pooler lets
# share a backend all see the same one, and PostgreSQL lets them share their locks.
MARK = "celery_pglock.session"

# Where the alias sets none: psycopg's own is over two minutes.
CONNECT_SECONDS = 10

TRANSACTION_TIMEOUT_SINCE = 170000
OLDEST_SERVER = 140000

# A token that is given out must not be forgotten in a crash.
SYNCHRONOUS_COMMIT = """
set_config('synchronous_commit', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)
"""

# Without it the backend of a killed client goes on waiting in pg_advisory_lock, and keeps its other locks
# meanwhile. Elsewhere than on Linux a server may refuse it.
CONNECTION_CHECK = """
CASE WHEN version() ~ 'linux' THEN set_config('client_connection_check_interval', '500', false) END
"""


class OnStandby(OperationalError):
    """The server is a standby: locks taken there exclude nobody on the primary, nor on other standbys."""


def check_vendor(alias: str) -> None:
    """Refuse an alias that is not PostgreSQL, or not there at all: it has no such locks."""
    if alias not in connections.settings:
        check_alias(alias, "using=")
    vendor = connections[alias].vendor
    if vendor != "postgresql":
        raise LockMisuse(
            f"The database alias {alias!r} is not PostgreSQL but {vendor}: point lock_using, using= or "
            f"CELERY_PGLOCK['USING'] at one that is."
        )


@dataclass(frozen=True, slots=True)
class RawConnection:
    """A connection that is fit for holding locks; ``mark`` is empty where no pooler can come between."""

    psycopg: psycopg.Connection[Any]
    backend_pid: int
    mark: str


def connect(alias: str, application_name: str, lease: float) -> RawConnection:
    """A new connection with the alias's own settings.

    The server ends it after ``lease`` seconds of silence. Raises Django's errors, ``OnStandby``, and
    ``LockMisuse`` for a server on which locks would not exclude.
    """
    check_vendor(alias)
    django_connection = connections[alias]
    # Django's cursors and adapters are for models; and a statement's label changes its text.
    parameters = {
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": milliseconds(lease),
        "keepalives_idle": max(1, int(lease / 3)),
        "keepalives_interval": max(1, int(lease / 6)),
        "keepalives_count": 3,
        **django_connection.get_connection_params(),
        "cursor_factory": None,
        "context": None,
        "prepare_threshold": None,
        "autocommit": True,
    }
    settings = _session_settings(lease) | {"application_name": application_name}
    if role := django_connection.settings_dict["OPTIONS"].get("assume_role"):
        settings["role"] = role
    with django_connection.wrap_database_errors:
        connection = psycopg.connect(**parameters)
        try:
            with _shut_down_after(CONNECT_SECONDS, connection):
                return _prepare(alias, connection, settings)
        except BaseException:
            connection.close()
            raise


def on_standby(alias: str) -> OnStandby:
    """The error that tells where to lock instead."""
    return OnStandby(
        f"The server of the database alias {alias!r} is a standby (in recovery): locks taken there exclude "
        f"nobody on the primary. Point the alias at the primary, for example with "
        f"'target_session_attrs': 'read-write' in its OPTIONS."
    )


def pooled(alias: str) -> LockMisuse:
    """The error that tells how to do without session-level locks through a pooler."""
    if current().POOLER == "session":
        return LockMisuse(
            f"CELERY_PGLOCK['POOLER'] says that the connection pooler before the database alias {alias!r} "
            f"runs in session mode, but it let two lock sessions share a backend: it runs in another mode, "
            f"or does not reset sessions. Session-level locks through it exclude nobody: see pool_mode and "
            f"server_reset_query of PgBouncer, or point CELERY_PGLOCK['USING'] at a direct alias."
        )
    return LockMisuse(
        f"Between the database alias {alias!r} and its server is a connection pooler, such as PgBouncer. "
        f"Unless it runs in session mode, session-level locks through it exclude nobody. Point lock_using, "
        f"using= or CELERY_PGLOCK['USING'] at an alias that connects to the server directly; or use "
        f"transaction-level locks (lock_xact=True, XactAdvisoryTask, advisory(..., xact=True)); or, if it "
        f"does run in session mode, say so by CELERY_PGLOCK['POOLER'] = 'session'."
    )


def _session_settings(lease: float) -> dict[str, str]:
    # A role or a server may set timeouts that would end a session for holding a lock, or for waiting for one.
    return {
        "idle_session_timeout": str(milliseconds(lease)),
        "statement_timeout": "0",
        # The row of a strict lock is written by whoever came last, and read by whoever comes next.
        "default_transaction_isolation": "read committed",
        "tcp_keepalives_idle": str(max(1, int(lease / 3))),
        "tcp_keepalives_interval": str(max(1, int(lease / 6))),
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": str(milliseconds(lease)),
    }


def _prepare(alias: str, connection: psycopg.Connection[Any], settings: dict[str, str]) -> RawConnection:
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        raise LockMisuse(
            f"The server of the database alias {alias!r} is PostgreSQL {version // 10000}: 14 is the oldest "
            f"that can end a silent session."
        )
    if version >= TRANSACTION_TIMEOUT_SINCE:
        settings = {**settings, "transaction_timeout": "0"}
    may_be_pooled = current().POOLER == "session"
    mark = uuid4().hex
    settings = {**settings, MARK: mark}
    # Settings must not stay behind in a session that a pooler gives to others. In one that is marked, or
    # holds locks, somebody else has put his: nobody may come after him before it was reset.
    columns = ", ".join(
        [SYNCHRONOUS_COMMIT, CONNECTION_CHECK, *["set_config(%s, %s, false)"] * len(settings)]
    )
    row = connection.execute(
        f"SELECT pg_backend_pid(), pg_is_in_recovery(), CASE WHEN (%s OR pg_backend_pid() = %s)"
        f" AND coalesce(current_setting('{MARK}', true), '') = '' AND NOT EXISTS ("
        f"SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')"
        f" THEN ARRAY[{columns}] END",
        [may_be_pooled, connection.info.backend_pid, *[text for pair in settings.items() for text in pair]],
    ).fetchone()
    assert row is not None
    backend_pid, is_standby, prepared = row
    if prepared is None:
        raise pooled(alias)
    if is_standby:
        raise on_standby(alias)
    return RawConnection(connection, backend_pid, "" if backend_pid == connection.info.backend_pid else mark)


def shut_down(descriptor: int) -> None:
    """Shut a socket down; whoever waits on it is woken. OSError if the other side was faster."""
    with socket.socket(fileno=os.dup(descriptor)) as line:
        line.shutdown(socket.SHUT_RDWR)


@contextmanager
def _shut_down_after(seconds: float, connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Bound what is asked in the block: psycopg has no timeout for an answer."""

    def give_up() -> None:
        with suppress(OSError, psycopg.Error):
            shut_down(connection.fileno())

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    undisturbed.start(timer)
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def cancel(connection: psycopg.Connection[Any], *, checks_its_client: bool = False) -> None:
    """Close it, and cancel what it still runs: a lock could be granted later to somebody who gave up.

    ``checks_its_client`` is for a server that finds out by itself: ``client_connection_check_interval``.
    """
    try:
        if connection.pgconn.transaction_status != TransactionStatus.ACTIVE:
            return
        if psycopg.capabilities.has_cancel_safe():
            connection.cancel_safe(timeout=CANCEL_SECONDS)
        elif not checks_its_client:
            # Before libpq 17 it has no timeout, and stops all threads of the process until it is answered.
            connection.cancel()
    except psycopg.Error as error:
        logger.warning("Cancelling a statement that was interrupted failed: %s", error)
    finally:
        connection.close()
