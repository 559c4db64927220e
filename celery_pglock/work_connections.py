"""Django's connections while a task works on them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from psycopg.pq import TransactionStatus

from celery_pglock import labels, markers
from celery_pglock.keys import Key
from celery_pglock.raw_connections import cancel

logger = logging.getLogger(__name__)

# Behind a pooler that gives sessions to others the marker would stay with them.
MARK = f"""
SELECT CASE WHEN pg_backend_pid() = %s THEN {markers.TAKE} END, set_config('application_name', %s, false)
"""
UNMARK = f"""
SELECT CASE WHEN pg_backend_pid() = %s THEN {markers.GIVE_BACK} END, set_config(
    'application_name', (SELECT reset_val FROM pg_settings WHERE name = 'application_name'), false
)
"""


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


class _Critical(threading.local):
    """The critical task that this thread runs: its id, and its priority, which is 0 outside of one."""

    task_id = ""
    priority = 0


_critical = _Critical()


@contextmanager
def marked(task_id: str, priority: int) -> Iterator[None]:
    """Connections on which this thread works in the block tell of a task with this priority.

    Each costs a round trip, before and after. Connections from Django's pool are left alone: what the task
    closes early would keep its marker there.
    """
    if not priority:
        yield
        return
    try:
        _critical.task_id, _critical.priority = task_id, priority
        for connection in connections.all(initialized_only=True):
            if not _mark(connection):
                connection.close()
        yield
    finally:
        _critical.task_id, _critical.priority = "", 0
        _unmark_all(priority)


def _unmark_all(priority: int) -> None:
    marked = list(connections.all(initialized_only=True))
    try:
        while marked:
            if not _unmark(marked[-1], priority):
                marked[-1].close()
            marked.pop()
    finally:
        # Where a time limit has interrupted it, what is left must not tell of the task any longer.
        for connection in marked:
            connection.close()


def mark_a_new_one(connection: Any, **_: Any) -> None:
    """Receives Django's signal ``connection_created``."""
    _mark(connection)


def _mark(connection: Any) -> bool:
    # In a transaction the marker would begin one, and stay if it failed.
    if not (_critical.priority and _can_be_marked(connection) and connection.connection.autocommit):
        return True
    name = labels.application_name(labels.WORK_CONNECTION, _critical.task_id)
    return _could_tell(connection, MARK, markers.marker(_critical.priority), name)


def _unmark(connection: Any, priority: int) -> bool:
    return not _can_be_marked(connection) or _could_tell(connection, UNMARK, markers.marker(priority))


def _could_tell(connection: Any, sql: str, marker: Key, *names: str) -> bool:
    """Whether it could be told: not on a connection that is broken, or whose transaction has failed."""
    session = connection.connection
    try:
        session.execute(sql, [session.info.backend_pid, *marker.arguments, *names])
    except psycopg.Error as error:
        logger.info("Alias %r does not tell of its critical task: %s", connection.alias, str(error).strip())
        return False
    return True


def _can_be_marked(connection: Any) -> bool:
    return bool(
        connection.vendor == "postgresql"
        and connection.connection is not None
        and not connection.settings_dict["OPTIONS"].get("pool")
    )


def aliases() -> set[str]:
    """The aliases of PostgreSQL on which this thread has worked."""
    return {
        connection.alias
        for connection in connections.all(initialized_only=True)
        if connection.vendor == "postgresql"
    }


def _buildable_connections() -> Iterator[Any]:
    for alias in connections:
        try:
            connection = connections[alias]
        except (ImproperlyConfigured, ImportError):
            # An alias whose driver is missing is none of this task's business.
            continue
        yield connection


def close_what_was_interrupted() -> None:
    """Close the connections of this thread on which a statement was interrupted, and cancel it."""
    for connection in connections.all(initialized_only=True):
        if _is_in_the_middle_of_a_statement(connection):
            cancel(connection.connection)
            connection.close()


def close_what_is_broken() -> None:
    """Close the connections of this thread that the server has ended, so that the next use opens new ones."""
    for connection in connections.all(initialized_only=True):
        is_between = connection.vendor == "postgresql" and not connection.in_atomic_block
        if is_between and connection.connection is not None and not connection.is_usable():
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
