"""Connections of psycopg's own, apart from Django's."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
from django.db import OperationalError, connections
from psycopg.pq import TransactionStatus

from celery_pglock.config import current
from celery_pglock.durations import milliseconds
from celery_pglock.errors import LockMisuse

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 1.0

# Where the alias sets none: psycopg's own is over two minutes.
CONNECT_SECONDS = 10

# How often a pooler that is said to run in session mode is asked for a backend that it lent already.
PROBES = 3

TRANSACTION_TIMEOUT_SINCE = 170000
OLDEST_SERVER = 140000

SYNCHRONOUS_COMMIT = """
set_config('synchronous_commit', coalesce(nullif(current_setting('synchronous_commit'), 'off'), 'on'), false)
"""


class OnStandby(OperationalError):
    """The server is a standby: locks taken there exclude nobody on the primary, nor on other standbys."""


def check_vendor(alias: str) -> None:
    """Refuse an alias that is not PostgreSQL: it has no such locks."""
    vendor = connections[alias].vendor
    if vendor != "postgresql":
        raise LockMisuse(
            f"The database alias {alias!r} is not PostgreSQL but {vendor}: point lock_using, using= or "
            f"CELERY_PGLOCK['USING'] at one that is."
        )


def connect(alias: str, application_name: str, lease: float) -> tuple[psycopg.Connection[Any], int]:
    """A new connection with the alias's own settings, fit for holding locks, and its backend's pid.

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
            backend_pid = _prepare(alias, connection, settings)
            if backend_pid != connection.info.backend_pid:
                with psycopg.connect(**parameters) as neighbour:
                    _check_session_mode(alias, backend_pid, connection, neighbour)
        except BaseException:
            connection.close()
            raise
    return connection, backend_pid


def check_exclusion(alias: str, lease: float) -> None:
    """Connect, and refuse as ``connect()`` does a server on which session-level locks would not exclude."""
    connect(alias, "pglock", lease)[0].close()


def on_standby(alias: str) -> OnStandby:
    """The error that tells where to lock instead."""
    return OnStandby(
        f"The server of the database alias {alias!r} is a standby (in recovery): locks taken there exclude "
        f"nobody on the primary. Point the alias at the primary, for example with "
        f"'target_session_attrs': 'read-write' in its OPTIONS."
    )


def pooled(alias: str) -> LockMisuse:
    """The error that tells how to do without session-level locks through a pooler."""
    return LockMisuse(
        f"Between the database alias {alias!r} and its server is a connection pooler, such as PgBouncer. "
        f"Unless it runs in session mode, session-level locks through it exclude nobody. Point lock_using, "
        f"using= or CELERY_PGLOCK['USING'] at an alias that connects to the server directly; or use "
        f"transaction-level locks (lock_xact=True, XactAdvisoryTask, advisory(..., xact=True)); or, if it "
        f"does run in session mode, say so by CELERY_PGLOCK['POOLER'] = 'session'."
    )


def _check_session_mode(
    alias: str, backend_pid: int, connection: psycopg.Connection[Any], neighbour: psycopg.Connection[Any]
) -> None:
    """Refuse a pooler that lets two connections share a session: it does not run in session mode."""
    for asked, is_ours in [(connection, True), (neighbour, False)] * PROBES:
        row = asked.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        if (row[0] == backend_pid) is not is_ours:
            raise pooled(alias)


def _session_settings(lease: float) -> dict[str, str]:
    # A role or a server may set timeouts that would end a session for holding a lock, or for waiting for
    # one. Without client_connection_check_interval the backend of a killed client goes on waiting in
    # pg_advisory_lock, and keeps its other locks meanwhile.
    return {
        "idle_session_timeout": str(milliseconds(lease)),
        "statement_timeout": "0",
        "client_connection_check_interval": "500",
        "tcp_keepalives_idle": str(max(1, int(lease / 3))),
        "tcp_keepalives_interval": str(max(1, int(lease / 6))),
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": str(milliseconds(lease)),
    }


def _prepare(alias: str, connection: psycopg.Connection[Any], settings: dict[str, str]) -> int:
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        raise LockMisuse(
            f"The server of the database alias {alias!r} is PostgreSQL {version // 10000}: 14 is the oldest "
            f"that can end a silent session."
        )
    if version >= TRANSACTION_TIMEOUT_SINCE:
        settings = {**settings, "transaction_timeout": "0"}
    may_be_pooled = current().POOLER == "session"
    # Settings must not stay behind in a session that a pooler gives to others.
    columns = ", ".join([SYNCHRONOUS_COMMIT, *["set_config(%s, %s, false)"] * len(settings)])
    row = connection.execute(
        f"SELECT pg_backend_pid(), pg_is_in_recovery(),"
        f" CASE WHEN %s OR pg_backend_pid() = %s THEN ARRAY[{columns}] END",
        [may_be_pooled, connection.info.backend_pid, *[text for pair in settings.items() for text in pair]],
    ).fetchone()
    assert row is not None
    backend_pid, is_standby, prepared = row
    if prepared is None:
        raise pooled(alias)
    if is_standby:
        raise on_standby(alias)
    return int(backend_pid)


def cancel(connection: psycopg.Connection[Any]) -> None:
    """Close it, and cancel what it still runs: a lock could be granted later to somebody who gave up."""
    try:
        if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=CANCEL_SECONDS)
    except psycopg.Error as error:
        logger.warning("Cancelling a statement that was interrupted failed: %s", error)
    finally:
        connection.close()
