"""Connections of psycopg's own, apart from Django's."""

from __future__ import annotations

import logging
from typing import Any, Final

import psycopg
from django.db import connections
from psycopg.pq import TransactionStatus

from celery_pglock.errors import LockMisuse

logger = logging.getLogger(__name__)

CANCEL_SECONDS = 1.0

# A role or a server may set timeouts that would end a session for holding a lock, or for waiting for
# one. Without client_connection_check_interval the backend of a killed client goes on waiting in
# pg_advisory_lock, and keeps its other locks meanwhile.
SESSION_SETTINGS: Final = {
    "statement_timeout": "0",
    "idle_session_timeout": "0",
    "client_connection_check_interval": "500",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

TRANSACTION_TIMEOUT_SINCE = 170000


def check_vendor(alias: str) -> None:
    """Refuse an alias that is not PostgreSQL: it has no such locks."""
    vendor = connections[alias].vendor
    if vendor != "postgresql":
        raise LockMisuse(
            f"The database alias {alias!r} is not PostgreSQL but {vendor}: point lock_using, using= or "
            f"CELERY_PGLOCK['USING'] at one that is."
        )


def connect(alias: str, application_name: str) -> psycopg.Connection[Any]:
    """A new connection with the alias's own settings, fit for holding locks; errors are Django's."""
    check_vendor(alias)
    django_connection = connections[alias]
    parameters = django_connection.get_connection_params()
    # Django's cursors and adapters are for models; and a statement's label changes its text.
    parameters |= {"cursor_factory": None, "context": None, "prepare_threshold": None}
    parameters |= {"autocommit": True, "application_name": application_name}
    settings = dict(SESSION_SETTINGS)
    if role := django_connection.settings_dict["OPTIONS"].get("assume_role"):
        settings["role"] = role
    with django_connection.wrap_database_errors:
        connection = psycopg.connect(**parameters)
        if connection.info.server_version >= TRANSACTION_TIMEOUT_SINCE:
            settings["transaction_timeout"] = "0"
        columns = ", ".join(["set_config(%s, %s, false)"] * len(settings))
        try:
            connection.execute(f"SELECT {columns}", [text for pair in settings.items() for text in pair])
        except BaseException:
            connection.close()
            raise
    return connection


def cancel(connection: psycopg.Connection[Any]) -> None:
    """Close it, and cancel what it still runs: a lock could be granted later to somebody who gave up."""
    try:
        if connection.pgconn.transaction_status == TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=CANCEL_SECONDS)
    except psycopg.Error as error:
        logger.warning("Cancelling a statement that was interrupted failed: %s", error)
    finally:
        connection.close()
