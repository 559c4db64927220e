"""Connections on which nothing that is asked of a server waits for long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import ProgrammingError, connections, transaction
from psycopg.errors import UndefinedTable

from celery_pglock.errors import LockMisuse
from celery_pglock.raw_connections import check_vendor

# In milliseconds: longer than any look takes, shorter than a person or a beat would wait.
LOCK_TIMEOUT = "1000"
STATEMENT_TIMEOUT = "10000"

# Within one transaction PostgreSQL shows the activity of its first look again and again: hence the clearing.
BOUND = """
SELECT current_setting('lock_timeout'), current_setting('statement_timeout'),
       set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true),
       pg_stat_clear_snapshot()
"""
BOUND_FOR_GOOD = "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false)"
RESTORE = "SELECT set_config('lock_timeout', %s, true), set_config('statement_timeout', %s, true)"


@contextmanager
def looking(alias: str) -> Iterator[None]:
    """A transaction, or a savepoint, in which nothing waits for long, and nothing is told from memory.

    Raises Django's errors, and ``LockMisuse`` where the views are missing.
    """
    check_vendor(alias)
    connection = connections[alias]
    is_nested = not connection.get_autocommit()
    with (
        _naming_what_is_missing(alias),
        transaction.atomic(using=alias),
        connection.cursor() as cursor,
    ):
        cursor.execute(BOUND, [LOCK_TIMEOUT, STATEMENT_TIMEOUT])
        *before, _, _, _ = cursor.fetchone()
        yield
        if is_nested:
            cursor.execute(RESTORE, before)


@contextmanager
def _naming_what_is_missing(alias: str) -> Iterator[None]:
    try:
        yield
    except ProgrammingError as error:
        if isinstance(error.__cause__, UndefinedTable):
            raise no_views(alias) from error
        raise


def leave_the_pool(connection: Any) -> None:
    """Let it connect by itself: those who wait may have all connections of Django's pool."""
    # The settings themselves are shared with all threads.
    options = {name: value for name, value in connection.settings_dict["OPTIONS"].items() if name != "pool"}
    connection.settings_dict = {**connection.settings_dict, "OPTIONS": options}


@contextmanager
def apart(alias: str) -> Iterator[Any]:
    """A connection apart from all others, in no transaction, on which nothing waits for long either."""
    check_vendor(alias)
    connection = connections[alias].copy()
    leave_the_pool(connection)
    try:
        with connection.cursor() as cursor:
            cursor.execute(BOUND_FOR_GOOD, [LOCK_TIMEOUT, STATEMENT_TIMEOUT])
        with _naming_what_is_missing(alias):
            yield connection
    finally:
        connection.close()


def no_views(alias: str) -> LockMisuse:
    """The error that tells how to get the views."""
    return LockMisuse(
        f"The database of alias {alias!r} lacks views or tables of ours: with 'celery_pglock' in "
        f"INSTALLED_APPS run manage.py migrate celery_pglock --database={alias}."
    )
