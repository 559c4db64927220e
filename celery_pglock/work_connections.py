"""Django's connections while a task works on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from psycopg.pq import TransactionStatus

from celery_pglock import labels
from celery_pglock.raw_connections import cancel

logger = logging.getLogger(__name__)


@contextmanager
def named_after(task_id: str) -> Iterator[None]:
    """Connections opened by this thread in the block are ``celery:<task id>`` to the server.

    It costs no round trip, as the name goes with the connection's parameters. Connections that are open
    already, or come from a pool, outlive the task: they keep their names.
    """
    name = labels.application_name(labels.WORK_CONNECTION, task_id)
    before: list[tuple[Any, dict[str, Any]]] = []
    for connection in _buildable_connections():
        settings = connection.settings_dict
        if connection.vendor == "postgresql" and not settings["OPTIONS"].get("pool"):
            before.append((connection, settings))
            # A copy: the dict itself is shared by all threads.
            connection.settings_dict = {
                **settings,
                "OPTIONS": {**settings["OPTIONS"], "application_name": name},
            }
    try:
        yield
    finally:
        for connection, settings in before:
            connection.settings_dict = settings


def _buildable_connections() -> Iterator[Any]:
    for alias in connections:
        # An alias whose driver is missing is none of this task's business.
        with suppress(ImproperlyConfigured, ImportError):
            yield connections[alias]


def close_what_was_interrupted() -> None:
    """Close the connections of this thread on which a statement was interrupted, and cancel it."""
    for connection in connections.all(initialized_only=True):
        if _is_in_the_middle_of_a_statement(connection):
            cancel(connection.connection)
            connection.close()


def _is_in_the_middle_of_a_statement(connection: Any) -> bool:
    if connection.vendor != "postgresql" or connection.connection is None:
        return False
    return bool(connection.connection.pgconn.transaction_status == TransactionStatus.ACTIVE)


def roll_back_what_was_left(task: str) -> None:
    """Close the connections of this thread that a task left inside of a transaction, ready for the next."""
    for connection in connections.all(initialized_only=True):
        # An interrupted COMMIT or ROLLBACK of Django's leaves autocommit off.
        is_between = connection.connection and connection.autocommit != connection.settings_dict["AUTOCOMMIT"]
        if connection.in_atomic_block or is_between or _is_in_the_middle_of_a_statement(connection):
            logger.warning("%s ended inside of a transaction on alias %r", task, connection.alias)
            connection.in_atomic_block = False
            connection.closed_in_transaction = False
            connection.close()
            # What else the wrapper remembers of the transaction goes with it.
            del connections[connection.alias]
