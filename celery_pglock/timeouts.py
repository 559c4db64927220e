"""How long statements on Django's connections may wait for their locks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg
from django.db import Error, connections
from psycopg.pq import TransactionStatus

from celery_pglock.blocks import Block, refuse_bare
from celery_pglock.config import check_alias
from celery_pglock.durations import UNSET, MaybeDuration, MaybeSeconds, milliseconds, seconds
from celery_pglock.errors import LockMisuse, did_you_mean
from celery_pglock.raw_connections import cancel, check_vendor

logger = logging.getLogger(__name__)

UNITS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")

# In microseconds since the epoch. Within one connection it tells transactions apart.
BEGIN_OF_TRANSACTION = "(extract(epoch FROM transaction_timestamp()) * 1000000)::bigint"

# pg_settings is read as a whole before the first column is evaluated.
PUT = f"""
SELECT setting, source, {BEGIN_OF_TRANSACTION}, set_config('lock_timeout', %s, %s)
FROM pg_settings WHERE name = 'lock_timeout'
"""
PUT_BACK_IN_TRANSACTION = f"SELECT set_config('lock_timeout', %s, true) WHERE {BEGIN_OF_TRANSACTION} = %s"
PUT_BACK_IN_SESSION = "SELECT set_config('lock_timeout', %s, false)"
# What came from a role, a database, a file or the connection's options comes from there again.
RESET = "RESET lock_timeout"


class _Setting:
    """One change of a connection's ``lock_timeout``, and what it takes to undo it."""

    def __init__(self, alias: str, timeout: float | None) -> None:
        self.alias = alias
        self.timeout = timeout
        self._connection: psycopg.Connection[Any] | None = None
        self._is_transactions = False
        self._sql = ""
        self._parameters: Sequence[object] | None = None

    def make(self) -> None:
        django_connection = connections[self.alias]
        with django_connection.cursor():
            django_connection.validate_no_broken_transaction()
        connection = django_connection.connection
        status = connection.pgconn.transaction_status
        self._is_transactions = not connection.autocommit or status == TransactionStatus.INTRANS
        value = "0" if self.timeout is None else str(milliseconds(self.timeout))
        with _closed_if_in_doubt(self.alias):
            before, source, begin, _ = connection.execute(PUT, [value, self._is_transactions]).fetchone()
            if self._is_transactions:
                self._sql, self._parameters = PUT_BACK_IN_TRANSACTION, [before, begin]
            elif source == "session":
                self._sql, self._parameters = PUT_BACK_IN_SESSION, [before]
            else:
                self._sql = RESET
            self._connection = connection

    def undo(self) -> None:
        connection = self._connection
        # A connection that was closed took its settings with it.
        if connection is None or connection.closed or connection is not connections[self.alias].connection:
            return
        status = connection.pgconn.transaction_status
        # Nothing can be set in an aborted transaction, and its rollback puts back what was before. Without
        # autocommit a statement after its end would begin another.
        if status == TransactionStatus.INERROR or (
            self._is_transactions and status == TransactionStatus.IDLE
        ):
            return
        try:
            with _closed_if_in_doubt(self.alias):
                connection.execute(self._sql, self._parameters)
        except Error:
            self._connection = None
            if not connection.closed:
                raise


class _Here(threading.local):
    """The settings that this thread has made, innermost last."""

    def __init__(self) -> None:
        self.settings: list[_Setting] = []


_here = _Here()


@dataclass(frozen=True, init=False)
class timeout(Block[None]):  # noqa: N801 - django-pglock's name, used like a function
    """How long each statement may wait for a lock: ``lock_timeout`` of Django's connection of the alias.

    timeout:
        Seconds (a number or a timedelta); ``0`` does not wait, which to PostgreSQL is 1 ms, ``None`` waits
        for ever. Or keywords as ``datetime.timedelta`` takes them: ``timeout(seconds=1, milliseconds=500)``.
    using:
        Alias in ``DATABASES``.

    A context manager and a decorator. A statement that waits longer fails with ``OperationalError``. What was
    in force before is in force again afterwards. It also bounds the wait of ``advisory`` without a timeout of
    its own, ``ExclusiveLock`` and ``ShareLock``, which wait elsewhere.

    Entered inside of a transaction it ends with that, if that ends first. On a connection that is closed in
    the block nothing is put back: one from a pool (``OPTIONS["pool"]``) goes back there as it is.
    """

    seconds: float | None
    using: str

    def __init__(self, timeout: MaybeDuration = UNSET, *, using: str = "default", **units: float) -> None:
        refuse_bare([timeout], "timeout")
        object.__setattr__(self, "seconds", _seconds(timeout, units))
        object.__setattr__(self, "using", using)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        check_alias(self.using, "timeout(using=...)")
        check_vendor(self.using)
        setting = _Setting(self.using, self.seconds)
        try:
            _here.settings.append(setting)
            setting.make()
            yield
            setting.undo()
        except BaseException:
            # Of the body, or of an interruption while it was put back.
            try:
                setting.undo()
            except Error as error:
                logger.warning("lock_timeout could not be put back on alias %r: %s", self.using, error)
            raise
        finally:
            _here.settings[:] = [one for one in _here.settings if one is not setting]


def in_force(alias: str) -> MaybeSeconds:
    """What the innermost ``timeout()`` around the caller says for this alias; unset if there is none."""
    for setting in reversed(_here.settings):
        if setting.alias == alias:
            return setting.timeout
    return UNSET


def _seconds(timeout: MaybeDuration, units: Mapping[str, float]) -> float | None:
    for unit, number in units.items():
        if unit not in UNITS:
            known = [*UNITS, "using", "timeout"]
            raise LockMisuse(f"timeout() takes no argument {unit!r}.{did_you_mean(unit, known)}")
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise LockMisuse(f"timeout({unit}=...) must be a number, not {number!r}.")
    if (timeout is UNSET) == (not units):
        raise LockMisuse(
            "timeout() takes either a number of seconds, a timedelta or None, or units such as seconds=1, "
            "milliseconds=500."
        )
    if timeout is UNSET:
        lengths = (number * timedelta(**{unit: 1}).total_seconds() for unit, number in units.items())
        timeout = float(sum(lengths))
    return seconds(timeout, "timeout")


@contextmanager
def _closed_if_in_doubt(alias: str) -> Iterator[None]:
    """Ask in the block; an interruption there closes the connection.

    Whether the server had set it by then nobody could tell, and the session takes it along. PostgreSQL's
    errors are raised as Django's.
    """
    connection = connections[alias]
    try:
        with connection.wrap_database_errors:
            yield
    except Error:
        raise
    except BaseException:
        if connection.connection is not None:
            cancel(connection.connection)
            connection.close()
        raise
