"""Connections on which nothing that is asked of a server waits for long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from django.db import DatabaseError, InterfaceError, ProgrammingError, connections, transaction
from psycopg.errors import UndefinedTable

from celery_pglock.errors import LockMisuse
from celery_pglock.raw_connections import check_vendor

# What a look may raise: it could not be made now, or never can.
FAILURES: Final = (DatabaseError, InterfaceError, LockMisuse)

# In milliseconds: longer than any look takes, shorter than a person or a beat would wait.
LOCK_TIMEOUT = "1000"
STATEMENT_TIMEOUT = "10000"

# PostgreSQL does not know how many locks and backends there are: it expects one, and would go through all
# backends for each lock. Where it has no other way than such a loop, it takes that for so much work that
# compiling the query first would pay.
SETTINGS = {
    "lock_timeout": LOCK_TIMEOUT,
    "statement_timeout": STATEMENT_TIMEOUT,
    "enable_nestloop": "off",
    "jit": "off",
}

# Within one transaction PostgreSQL shows the activity of its first look again and again: hence the clearing.
BOUND = f"""
SELECT {", ".join(f"current_setting('{name}')" for name in SETTINGS)},
       {", ".join(["set_config(%s, %s, true)"] * len(SETTINGS))}, pg_stat_clear_snapshot()
"""
BOUND_FOR_GOOD = "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false)"
RESTORE = f"SELECT {', '.join(['set_config(%s, %s, true)'] * len(SETTINGS))}"


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
        cursor.execute(BOUND, [text for pair in SETTINGS.items() for text in pair])
        before = dict(zip(SETTINGS, cursor.fetchone(), strict=False))
        yield
        if is_nested:
            cursor.execute(RESTORE, [text for pair in before.items() for text in pair])


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
