"""Claims on keys: taking them, and giving them back."""

from __future__ import annotations

import logging
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from django.db import DatabaseError, connections, transaction

from celery_pglock import statements
from celery_pglock.config import current
from celery_pglock.durations import UNSET, MaybeSeconds
from celery_pglock.errors import LockLost, LockMisuse
from celery_pglock.keys import Key
from celery_pglock.labels import Owner
from celery_pglock.pool import pool
from celery_pglock.sessions import REFUSALS, LockSession, Refused, check_vendor

logger = logging.getLogger(__name__)

NOBODY = Owner()

TAKEN = "it is taken"

# Polling for a free slot: quick at first, then about ten times a second.
FIRST_POLL = 0.01
LONGEST_POLL = 0.1

LOCK_TIMEOUT_IN_FORCE = "SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'"


@dataclass(slots=True)
class Hold:
    """One acquisition of a lock, from taking it to giving it back; ``keys`` are those really taken."""

    name: str
    shared: bool
    keys: tuple[Key, ...] = ()
    session: LockSession | None = None
    transaction: Any = None
    waited: float = 0.0
    since: float = 0.0

    def give_back(self, error: BaseException | None = None) -> bool:
        """End the transaction, or unlock; answers whether the lock had been kept until here."""
        if self.transaction is not None:
            self.transaction.__exit__(type(error) if error else None, error, None)
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

    def take(self, owner: Owner = NOBODY, *, open_transaction: bool = True) -> Hold | Refusal:
        """Take all the keys on behalf of an owner; with the transaction that keeps them, if wanted."""
        started = time.monotonic()
        hold = Hold(self.name, self.shared)
        if self.xact and open_transaction:
            hold.transaction = self._durable_transaction()
        try:
            reason = self._fill(hold, owner, started)
        except BaseException as error:
            hold.give_back(error)
            raise
        hold.since = time.monotonic()
        hold.waited = hold.since - started
        if not reason:
            return hold
        if hold.transaction is not None:
            transaction.set_rollback(rollback=True, using=self.using)
            hold.give_back()
        return Refusal(reason, hold.waited)

    def _durable_transaction(self) -> Any:
        block = transaction.atomic(using=self.using, durable=True)
        try:
            block.__enter__()
        except RuntimeError:
            raise LockMisuse(
                "A transaction-level lock opens a transaction of its own, and one is open already: use "
                "advisory(..., xact=True).acquire() inside of it."
            ) from None
        return block

    def _fill(self, hold: Hold, owner: Owner, started: float) -> str | None:
        """Put what was taken into the hold; answers why nothing was."""
        if not current().ENABLED:
            return None
        attempt = self._attempt_in_transaction if self.xact else self._attempt_in_session
        if self.limit == 1:
            return attempt(hold, owner)
        timeout = self._timeout_in_force() if self.timeout is UNSET else self.timeout
        pause = FIRST_POLL
        while reason := attempt(hold, owner):
            left = None if timeout is None else started + timeout - time.monotonic()
            if left is not None and left <= 0:
                return reason
            time.sleep(min(pause * random.uniform(0.5, 1), pause if left is None else left))
            pause = min(2 * pause, LONGEST_POLL)
        return None

    def _attempt_in_session(self, hold: Hold, owner: Owner) -> str | None:
        session = pool().lease(self.using, owner)
        keys: tuple[Key, ...] | None = self.keys
        try:
            if self.limit > 1:
                keys = session.take_slots([key.slots(self.limit) for key in self.keys])
            elif not session.take(self.keys, shared=self.shared, timeout=self.timeout):
                keys = None
        except Refused as refused:
            return str(refused)
        finally:
            pool().give_back(session)
        if keys is None:
            return TAKEN
        hold.session, hold.keys = session, keys
        return None

    def _attempt_in_transaction(self, hold: Hold, owner: Owner) -> str | None:
        check_vendor(self.using)
        waits = self.limit == 1 and self.timeout != 0
        if self.limit > 1:
            statement = statements.take_slots([key.slots(self.limit) for key in self.keys], xact=True)
        elif waits:
            statement = statements.take_waiting(
                self.keys, shared=self.shared, xact=True, timeout=self.timeout
            )
        else:
            statement = statements.take_at_once(self.keys, shared=self.shared, xact=True)
        # A refusal aborts a transaction, and only a savepoint gives partial gains back.
        fragile = hold.transaction is None and (waits or len(self.keys) > 1)
        try:
            with transaction.atomic(self.using) if fragile else nullcontext():
                with connections[self.using].cursor() as cursor:
                    cursor.execute(statement.sql, statement.parameters)
                    answer = cursor.fetchone()[-1]
                if fragile and not answer:
                    transaction.set_rollback(rollback=True, using=self.using)
        except DatabaseError as error:
            if reason := REFUSALS.get(type(error.__cause__)):
                return reason
            raise
        return None if answer else TAKEN

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
