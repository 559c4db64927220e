"""Claims on keys: taking them, and giving them back."""

from __future__ import annotations

import logging
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from django.db import DatabaseError, connections, transaction
from django.utils.asyncio import async_unsafe

from celery_pglock import labels, statements
from celery_pglock.config import current
from celery_pglock.durations import UNSET, MaybeSeconds
from celery_pglock.errors import LockLost, LockMisuse
from celery_pglock.keys import Key
from celery_pglock.labels import Holding, Owner
from celery_pglock.pool import pool
from celery_pglock.raw_connections import cancel, check_vendor
from celery_pglock.sessions import REFUSALS, LockSession, Refused
from celery_pglock.statements import Statement

logger = logging.getLogger(__name__)

NOBODY = Owner()

TAKEN = "it is taken"

# Polling for a free slot: quick at first, then about ten times a second.
FIRST_POLL = 0.01
LONGEST_POLL = 0.1

LOCK_TIMEOUT_IN_FORCE = "SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'"


@dataclass(slots=True)
class Hold:
    """One acquisition of a lock, from before it is taken until it is given back.

    ``keys`` are those really taken, ``transaction`` is the block that was opened for them. ``waited`` is in
    seconds, ``since`` on the monotonic clock.
    """

    name: str
    shared: bool
    using: str
    keys: tuple[Key, ...] = ()
    session: LockSession | None = None
    transaction: Any = None
    waited: float = 0.0
    since: float = 0.0

    def open_transaction(self) -> None:
        """Open the durable transaction that will keep a transaction-level lock."""
        block = transaction.atomic(using=self.using, durable=True)
        self.transaction = block
        try:
            block.__enter__()
        except RuntimeError as error:
            self.transaction = None
            if not connections[self.using].in_atomic_block:
                raise
            raise LockMisuse(
                "A transaction-level lock opens a transaction of its own, and one is open already: use "
                "advisory(..., xact=True).acquire() inside of it, or run the task outside of it."
            ) from error

    def give_back(self, error: BaseException | None = None) -> bool:
        """End the transaction, or unlock; answers whether the lock had been kept until here."""
        if self.transaction is not None:
            # A connection that was closed took the lock and the work with it, and Django is silent then.
            kept = not connections[self.using].closed_in_transaction
            self.transaction.__exit__(type(error) if error else None, error, None)
            return kept
        if self.session is None:
            return True
        try:
            return self.session.give_back(self.keys, shared=self.shared)
        finally:
            pool().give_back(self.session)

    def leave(self, error: BaseException | None) -> None:
        """Give back after a body that ended with this error, or well; its own error is never hidden."""
        if self.give_back(error):
            return
        if error is None:
            raise LockLost(self.name)
        logger.warning("lock %r was lost before its body failed", self.name)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was taken, after waiting this many seconds."""

    reason: str
    waited: float


@dataclass(frozen=True)
class Claim:
    """Which keys are wanted, and how; all of them or none."""

    keys: tuple[Key, ...]
    shared: bool
    xact: bool
    limit: int
    using: str
    timeout: MaybeSeconds

    @property
    def name(self) -> str:
        """The names of its keys, for people."""
        return ", ".join(key.name for key in self.keys)

    def hold(self) -> Hold:
        """An empty hold on this claim's keys."""
        return Hold(self.name, self.shared, self.using)

    def take(self, *, open_transaction: bool = True) -> Hold | Refusal:
        """Take all the keys for nobody in particular; with the transaction that keeps them, if wanted."""
        hold = self.hold()
        try:
            refusal = self.fill(hold, NOBODY, self.timeout, open_transaction=open_transaction)
        except BaseException as error:
            hold.give_back(error)
            raise
        return refusal or hold

    @async_unsafe("A lock is held by a thread, which coroutines share: take it inside of sync_to_async().")
    def fill(
        self, hold: Hold, owner: Owner, timeout: MaybeSeconds, *, open_transaction: bool = True
    ) -> Refusal | None:
        """Put what was taken into the hold, which its caller gives back even if this raises.

        Where nothing was taken the hold is empty again, and its transaction rolled back.
        """
        started = time.monotonic()
        if self.xact and open_transaction:
            hold.open_transaction()
        reason = self._reason_why_not(hold, owner, timeout, started)
        hold.since = time.monotonic()
        hold.waited = hold.since - started
        if not reason:
            return None
        if hold.transaction is not None:
            transaction.set_rollback(rollback=True, using=self.using)
            hold.give_back()
            hold.transaction = None
        return Refusal(reason, hold.waited)

    def _reason_why_not(self, hold: Hold, owner: Owner, timeout: MaybeSeconds, started: float) -> str | None:
        if not current().ENABLED:
            return None
        attempt = self._attempt_in_transaction if self.xact else self._attempt_in_session
        if self.limit == 1:
            return attempt(hold, owner, timeout)
        if timeout is UNSET:
            timeout = self._timeout_in_force()
        pause = FIRST_POLL
        while reason := attempt(hold, owner, timeout):
            left = None if timeout is None else started + timeout - time.monotonic()
            if left is not None and left <= 0:
                return reason
            time.sleep(min(pause * random.uniform(0.5, 1), pause if left is None else left))
            pause = min(2 * pause, LONGEST_POLL)
        return None

    def _attempt_in_session(self, hold: Hold, owner: Owner, timeout: MaybeSeconds) -> str | None:
        session = pool().lease(self.using, owner)
        keys: tuple[Key, ...] | None = self.keys
        try:
            if self.limit > 1:
                keys = session.take_slots([key.slots(self.limit) for key in self.keys])
            elif not session.take(self.keys, shared=self.shared, timeout=timeout):
                keys = None
            if keys is not None:
                hold.session, hold.keys = session, keys
        except Refused as refused:
            return str(refused)
        except BaseException:
            # What it may have taken in the last moment, no hold would give back.
            if hold.session is None:
                session.abandon()
            raise
        finally:
            pool().give_back(session)
        return TAKEN if keys is None else None

    def _attempt_in_transaction(self, hold: Hold, owner: Owner, timeout: MaybeSeconds) -> str | None:
        check_vendor(self.using)
        waits = self.limit == 1 and timeout != 0
        if self.limit > 1:
            statement = statements.take_slots([key.slots(self.limit) for key in self.keys], xact=True)
        elif waits:
            statement = statements.take_waiting(self.keys, shared=self.shared, xact=True, timeout=timeout)
        else:
            statement = statements.take_at_once(self.keys, shared=self.shared, xact=True)
        # A refusal aborts a transaction, and only a savepoint gives partial gains back.
        fragile = hold.transaction is None and (waits or len(self.keys) > 1)
        try:
            with transaction.atomic(self.using) if fragile else nullcontext():
                with connections[self.using].cursor() as cursor:
                    cursor.execute(*self._labelled(statement, owner))
                    answer = cursor.fetchone()[-1]
                if fragile and not answer:
                    transaction.set_rollback(rollback=True, using=self.using)
        except DatabaseError as error:
            if reason := REFUSALS.get(type(error.__cause__)):
                return reason
            raise
        except BaseException:
            if (interrupted := connections[self.using].connection) is not None:
                cancel(interrupted)
            raise
        if not answer:
            return TAKEN
        hold.keys = self.keys
        return None

    def _labelled(self, statement: Statement, owner: Owner) -> tuple[str, list[int | str]]:
        """The statement with what tells a task's transaction from others, to the end of the transaction."""
        if not owner.task_id:
            return statement.sql, statement.parameters
        now = time.time()
        holdings = [Holding(key, now) for key in self.keys]
        comment = labels.comment(owner, holdings, show_names=current().SHOW_NAMES)
        name = labels.application_name(labels.WORK_CONNECTION, owner.task_id)
        sql = f"{comment.replace('%', '%%')} SELECT set_config('application_name', %s, true), "
        return f"{sql}{statement.columns}{statement.source}", [name, *statement.parameters]

    def _timeout_in_force(self) -> float | None:
        if self.xact:
            with connections[self.using].cursor() as cursor:
                cursor.execute(LOCK_TIMEOUT_IN_FORCE)
                milliseconds = cursor.fetchone()[0]
        else:
            session = pool().lease(self.using, Owner())
            try:
                milliseconds = session.rows(LOCK_TIMEOUT_IN_FORCE, [])[0][0]
            finally:
                pool().give_back(session)
        return milliseconds / 1000 or None
