"""The database session a lock lives on, and dies with."""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import psycopg
from django.db import DatabaseError, connections
from psycopg.errors import DeadlockDetected, LockNotAvailable
from psycopg.pq import TransactionStatus

from celery_pglock import labels, statements
from celery_pglock.config import current
from celery_pglock.durations import MaybeSeconds
from celery_pglock.errors import LockLost
from celery_pglock.keys import Key
from celery_pglock.labels import Holding, Owner
from celery_pglock.raw_connections import cancel, connect
from celery_pglock.statements import Statement

logger = logging.getLogger(__name__)

# PostgreSQL's own refusals: busy (55P03) and deadlock (40P01). They leave the session as it was.
REFUSALS: Final[dict[type[Any], str]] = {
    LockNotAvailable: "lock_timeout ran out",
    DeadlockDetected: "PostgreSQL chose it as the victim of a deadlock",
}

OWN_LOCKS = """
SELECT objsubid, classid::bigint, objid::bigint FROM pg_locks
WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND granted AND mode = %s
"""


class Refused(Exception):
    """PostgreSQL would not wait any longer; the message says why, and nothing was gained."""


def mode(*, shared: bool) -> str:
    """The lock's mode as ``pg_locks`` names it."""
    return "ShareLock" if shared else "ExclusiveLock"


class LockSession:
    """A PostgreSQL session apart from Django's connections, used by one thread at a time.

    It counts what it holds, because a thread re-enters its own locks. PostgreSQL's errors are raised as
    Django's. After anything that leaves its state in doubt it is closed, and never used again.
    """

    def __init__(self, alias: str, owner: Owner) -> None:
        self.alias = alias
        self.owner = owner
        # A forked child must not speak on its parent's socket: hence the pid.
        self.process = os.getpid()
        self._counts: dict[tuple[Key, bool], int] = {}
        self._since: dict[Key, float] = {}
        self._connection = connect(alias, _application_name(owner))

    @property
    def _as_django_errors(self) -> Any:
        # Asked for each time: Django's wrapper belongs to a thread, and a session goes from one to another.
        return connections[self.alias].wrap_database_errors

    @property
    def is_ours(self) -> bool:
        return self.process == os.getpid()

    @property
    def is_closed(self) -> bool:
        return self._connection.closed

    @property
    def is_alive(self) -> bool:
        """Whether the server still keeps it, as far as its socket tells."""
        if self._connection.closed:
            return False
        watch = select.poll()
        watch.register(self._connection.fileno(), select.POLLIN)
        try:
            # A healthy idle session is silent but for news of a setting changed by a reload.
            while watch.poll(0):
                self._connection.pgconn.consume_input()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def holds_nothing(self) -> bool:
        return not self._counts

    def held_among(self, keys: Iterable[Key], *, shared: bool) -> Key | None:
        """The first of these keys that this session holds in this mode."""
        return next((key for key in keys if (key, shared) in self._counts), None)

    def take(self, keys: Sequence[Key], *, shared: bool, timeout: MaybeSeconds) -> bool:
        """Take all keys in this order or none; a key that is held already is only counted.

        Raises ``Refused`` where PostgreSQL did.
        """
        self._check_what_is_held()
        fresh = [key for key in keys if (key, shared) not in self._counts]
        if not fresh:
            self._count(keys, shared=shared)
            return True
        if timeout == 0:
            statement = statements.take_at_once(fresh, shared=shared, xact=False)
        else:
            statement = statements.take_waiting(fresh, shared=shared, xact=False, timeout=timeout)
        try:
            if not self._answer(statement, self._holdings(fresh)):
                return False
            self._count(keys, shared=shared)
        except Refused:
            self._give_back_gains(fresh, shared=shared)
            raise
        except BaseException:
            self.abandon()
            raise
        return True

    def take_slots(self, slots_by_key: Sequence[Sequence[Key]]) -> tuple[Key, ...] | None:
        """Take one free slot of every key, or none; answers the slots taken.

        A key of which this session holds a slot already is only counted.
        """
        self._check_what_is_held()
        held = [self.held_among(slots, shared=False) for slots in slots_by_key]
        fresh = [slots for slots, mine in zip(slots_by_key, held, strict=True) if mine is None]
        numbers: Iterable[int] | None = ()
        try:
            if fresh:
                statement = statements.take_slots(fresh, xact=False)
                numbers = self._answer(statement, self._holdings([slots[0] for slots in fresh]))
            if numbers is None:
                return None
            gained = [slots[number] for slots, number in zip(fresh, numbers, strict=True)]
            taken = tuple(mine or gained.pop(0) for mine in held)
            self._count(taken, shared=False)
        except BaseException:
            self.abandon()
            raise
        return taken

    def give_back(self, keys: Sequence[Key], *, shared: bool) -> bool:
        """Give back one acquisition of these keys; answers whether they had been kept to the end."""
        if not self.is_ours:
            return True
        if self.is_closed:
            return False
        try:
            last = [key for key in keys if self._counts[key, shared] == 1]
            kept = True
            if last:
                remaining = [holding for holding in self._holdings() if holding.key not in last]
                kept = self._answer(statements.give_back(last, shared=shared), remaining)
            for key in keys:
                self._counts[key, shared] -= 1
                if not self._counts[key, shared]:
                    del self._counts[key, shared]
            if not kept:
                logger.warning("PostgreSQL says that this session did not hold %s", _names(keys))
                self.abandon()
        except DatabaseError as error:
            logger.warning("Releasing %s failed: %s", _names(keys), error)
            self.abandon()
            return False
        except BaseException:
            self.abandon()
            raise
        return kept

    def rows(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """The rows of a statement that takes nothing and gives nothing back."""
        try:
            with self._as_django_errors:
                return self._connection.execute(self._label(self._holdings()) + sql, parameters).fetchall()
        except BaseException:
            # An error that the server told changes nothing of what the session holds.
            if self._connection.pgconn.transaction_status != TransactionStatus.IDLE:
                self.abandon()
            raise

    def close(self) -> None:
        """End the session; what it still held is lost to those who believe that they hold it."""
        self._counts.clear()
        if self.is_ours:
            self._connection.close()

    def abandon(self) -> None:
        """Close it at once, whatever it may be doing."""
        if self.is_ours:
            cancel(self._connection)
        self.close()

    def _answer(self, statement: Statement, holdings: Sequence[Holding]) -> Any:
        owner = self.owner if holdings else Owner()
        sql = (
            f"{self._label(holdings)}SELECT set_config('application_name', %s, false), "
            f"{statement.columns}{statement.source}"
        )
        try:
            with self._as_django_errors:
                cursor = self._connection.execute(sql, [_application_name(owner), *statement.parameters])
                row = cursor.fetchone()
        except DatabaseError as error:
            if reason := REFUSALS.get(type(error.__cause__)):
                raise Refused(reason) from None
            raise
        assert row is not None
        return row[-1]

    def _label(self, holdings: Sequence[Holding]) -> str:
        owner = self.owner if holdings else Owner()
        comment = labels.comment(owner, holdings, show_names=current().SHOW_NAMES)
        return comment.replace("%", "%%") + " "

    def _give_back_gains(self, fresh: Sequence[Key], *, shared: bool) -> None:
        # A session-level lock survives the error of the statement that took it. Which ones were taken
        # before the refusal only the server knows.
        if len(fresh) == 1:
            return
        rows = set(self.rows(OWN_LOCKS, [mode(shared=shared)]))
        gains = [key for key in fresh if (key.objsubid, key.classid, key.objid) in rows]
        if gains:
            self._count(gains, shared=shared)
            self.give_back(gains, shared=shared)

    def _check_what_is_held(self) -> None:
        if self._counts and not self.is_alive:
            lost = ", ".join(sorted(key.name for key, _ in self._counts))
            self.close()
            raise LockLost(lost)

    def _count(self, keys: Sequence[Key], *, shared: bool) -> None:
        now = time.time()
        for key in keys:
            self._counts[key, shared] = self._counts.get((key, shared), 0) + 1
            self._since.setdefault(key, now)

    def _holdings(self, fresh: Iterable[Key] = ()) -> list[Holding]:
        held = {key for key, _ in self._counts}
        self._since = {key: since for key, since in self._since.items() if key in held}
        now = time.time()
        return [Holding(key, self._since.get(key, now)) for key in sorted(held | set(fresh))]


def _application_name(owner: Owner) -> str:
    return labels.application_name(labels.LOCK_SESSION, owner.task_id)


def _names(keys: Iterable[Key]) -> str:
    return ", ".join(repr(key.name) for key in keys)
