"""Claims on keys: taking them, and giving them back."""

from __future__ import annotations

import logging
import random
import time
from asyncio import _get_running_loop
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from django.db import DatabaseError, Error, OperationalError, connections, transaction
from django.utils.asyncio import async_unsafe
from psycopg.errors import QueryCanceled

from celery_pglock import labels, statements, timeouts
from celery_pglock.clocks import now
from celery_pglock.config import current
from celery_pglock.durations import UNSET, MaybeSeconds
from celery_pglock.errors import LockLost, LockMisuse
from celery_pglock.fences import Handover, Token
from celery_pglock.keys import Key
from celery_pglock.labels import NOBODY, Holding, Owner
from celery_pglock.lifelines import GIVE_UP
from celery_pglock.pool import pool
from celery_pglock.raw_connections import cancel, check_vendor, on_standby
from celery_pglock.sessions import SILENT, Gain, LockSession
from celery_pglock.statements import Statement
from celery_pglock.voices import REFUSALS, TIMED_OUT, NoRoom, Refused

logger = logging.getLogger(__name__)

TAKEN = "it is taken"
ENDED = "PostgreSQL ended the wait"

# Polling for a free slot: quick at first, then about ten times a second.
FIRST_POLL = 0.01
LONGEST_POLL = 0.1

# Fractions of a lease: how long a session that holds locks waits for another before it is heard again, and
# how long a strict lock stays with nobody after a holder that did not leave in order. Such a one gives up
# after GIVE_UP; the rest is for telling it.
ROUND = 0.2
LOCK_DELAY = GIVE_UP + 0.05

# In seconds. The view pg_settings would read them all.
LOCK_TIMEOUT_IN_FORCE = "SELECT extract(epoch FROM current_setting('lock_timeout')::interval)::float8"


@dataclass(slots=True)
class Hold:
    """One acquisition of a lock, from before it is taken until it is given back.

    ``keys`` are those really taken, ``tokens`` are a strict one's, ``transaction`` is the block that was
    opened for them. ``waited`` is in seconds, ``since`` on the monotonic clock; ``in_order`` tells that none
    who held it before can still believe in it, so that this one leaves in order.
    """

    claim: Claim
    keys: tuple[Key, ...] = ()
    tokens: Mapping[Key, Token] = field(default_factory=dict)
    session: LockSession | None = None
    transaction: Any = None
    waited: float = 0.0
    since: float = 0.0
    in_order: bool = True

    @property
    def name(self) -> str:
        return self.claim.name

    @property
    def shared(self) -> bool:
        return self.claim.shared

    @property
    def using(self) -> str:
        return self.claim.using

    @property
    def loss(self) -> str:
        """Why the lock is gone, as far as is known without asking the server; empty while it is there."""
        if self.session is not None and not self.session.is_believed:
            return self.session.loss or SILENT
        if self.transaction is not None:
            connection = connections[self.using]
            if connection.closed_in_transaction or not connection.in_atomic_block:
                return "its transaction's connection was closed"
        return ""

    @property
    def is_over(self) -> bool:
        """Whether its session was closed, or made to give the keys back, by somebody else than its owner."""
        if self.session is None:
            return False
        return self.session.is_closed or not self.session.held_among(self.keys, shared=self.shared)

    def check(self) -> None:
        """Raise ``LockLost`` if the lock is gone."""
        if loss := self.loss:
            raise LockLost(self.name, loss)

    def open_transaction(self) -> None:
        """Open the durable transaction that will keep a transaction-level lock."""
        block = transaction.atomic(using=self.using, durable=True)
        self.transaction = block
        try:
            block.__enter__()
        except Error:
            # PostgreSQL could not be asked: there is nothing to roll back.
            self.transaction = None
            raise
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
            return self.session.give_back(self.keys, shared=self.shared, in_order=self.in_order)
        finally:
            pool().give_back(self.session)

    def empty(self, error: BaseException | None) -> None:
        """Give back what no body will use."""
        try:
            self.give_back(error)
        finally:
            self.session, self.transaction, self.keys = None, None, ()

    def leave(self, error: BaseException | None) -> None:
        """Give back after a body that ended with this error, or well; its own error is never hidden."""
        # That of a session can be asked for later, too.
        loss = self.loss if self.session is None else ""
        if self.give_back(error):
            return
        if error is None:
            loss = loss or (self.session.loss if self.session else "")
            raise LockLost(self.name, *filter(None, [loss]))
        logger.warning("lock %r was lost before its body failed", self.name)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was taken, after waiting this many seconds."""

    reason: str
    waited: float


@async_unsafe("A lock is held by a thread, which coroutines share: take it inside of sync_to_async().")
def _refuse_in_coroutines() -> None:
    """Raises Django's ``SynchronousOnlyOperation``, unless that is turned off."""


Attempt: TypeAlias = Callable[[Hold, Owner, MaybeSeconds], str | None]


@dataclass(frozen=True)
class Claim:
    """Which keys are wanted, and how; all of them or none."""

    keys: tuple[Key, ...]
    shared: bool
    xact: bool
    limit: int
    using: str
    timeout: MaybeSeconds
    strict: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """The names of its keys, for people."""
        return ", ".join(key.name for key in self.keys)

    def hold(self) -> Hold:
        """An empty hold on this claim's keys."""
        return Hold(self)

    def take(self, hold: Hold | None = None, *, open_transaction: bool = True) -> Hold | Refusal:
        """Take all the keys for nobody in particular; with the transaction that keeps them, if wanted.

        Into this hold, or a new one.
        """
        hold = hold or self.hold()
        timeout = self.timeout
        if timeout is UNSET and not self.xact:
            # It waits on another session than the one that timeout() has set.
            timeout = timeouts.in_force(self.using)
        try:
            refusal = self.fill(hold, NOBODY, timeout, open_transaction=open_transaction)
        except BaseException as error:
            hold.empty(error)
            raise
        return refusal or hold

    def fill(
        self, hold: Hold, owner: Owner, timeout: MaybeSeconds, *, open_transaction: bool = True
    ) -> Refusal | None:
        """Put what was taken into the hold, which its caller gives back even if this raises.

        Where nothing was taken the hold is empty again, and its transaction rolled back.
        """
        if _get_running_loop() is not None:
            _refuse_in_coroutines()
        started = time.monotonic()
        if self.xact:
            if current().ENABLED:
                check_vendor(self.using)
            if open_transaction:
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
        return Refusal(reason, waited=0.0 if timeout == 0 else hold.waited)

    def _reason_why_not(self, hold: Hold, owner: Owner, timeout: MaybeSeconds, started: float) -> str | None:
        if not current().ENABLED:
            return None
        attempt = self._attempt_in_transaction if self.xact else self._attempt_in_session
        if self.limit > 1:
            return self._poll(attempt, hold, owner, timeout, started)
        leased = pool().leased.get(self.using)
        if timeout != 0 and not self.xact and leased is not None and leased.holds_others_than(self.keys):
            leased.check()
            return self._wait_in_rounds(leased.lease, hold, owner, timeout, started)
        return attempt(hold, owner, timeout)

    def _poll(
        self, attempt: Attempt, hold: Hold, owner: Owner, timeout: MaybeSeconds, started: float
    ) -> str | None:
        pause = FIRST_POLL
        while reason := attempt(hold, owner, timeout):
            if timeout is UNSET:
                timeout = self._timeout_in_force()
            left = None if timeout is None else started + timeout - time.monotonic()
            if left is not None and left <= 0:
                return reason
            time.sleep(min(pause * random.uniform(0.5, 1), pause if left is None else left))
            pause = min(2 * pause, LONGEST_POLL)
        return None

    def _wait_in_rounds(
        self, lease: float, hold: Hold, owner: Owner, timeout: MaybeSeconds, started: float
    ) -> str | None:
        """Wait on a session that holds other locks already, which must be heard meanwhile."""
        if timeout is UNSET:
            timeout = self._timeout_in_force()
        while True:
            left = ROUND * lease if timeout is None else max(0.0, started + timeout - time.monotonic())
            reason = self._attempt_in_session(hold, owner, min(left, ROUND * lease))
            if reason != TIMED_OUT or left < ROUND * lease:
                return reason

    def _attempt_in_session(self, hold: Hold, owner: Owner, timeout: MaybeSeconds) -> str | None:
        session = pool().lease(self.using, owner)
        gain: Gain | None = None
        try:
            if self.limit > 1:
                gain = session.take_slots([key.slots(self.limit) for key in self.keys])
            else:
                gain = session.take(self.keys, shared=self.shared, timeout=timeout, strict=self.strict)
            if gain is not None:
                hold.session, hold.keys, hold.tokens = session, gain.keys, gain.tokens
                hold.in_order = not (gain.handover and gain.handover.unclean_lease)
        except Refused as refused:
            return str(refused)
        except NoRoom:
            raise
        except BaseException:
            # What it may have taken in the last moment, no hold would give back.
            if hold.session is None:
                session.abandon()
            raise
        finally:
            if hold.session is None:
                pool().give_back(session)
        if gain is None:
            return TAKEN
        if gain.handover and gain.handover.unclean_lease:
            self._outlast_the_last_holder(hold, gain.handover)
        return None

    def _outlast_the_last_holder(self, hold: Hold, handover: Handover) -> None:
        """Wait until a holder that did not leave in order has given up, if it lives."""
        delay = LOCK_DELAY * handover.unclean_lease
        logger.info(
            "lock %r was not given back by its last holder (task %s): waiting for %.1f s",
            self.name,
            handover.left_by or "unknown",
            delay,
        )
        over = now() + delay
        while (left := over - now()) > 0:
            time.sleep(min(left, LONGEST_POLL))
            if hold.loss:
                raise OperationalError(f"The lock session was lost while it waited: {hold.loss}.")
        hold.in_order = True

    def _attempt_in_transaction(self, hold: Hold, owner: Owner, timeout: MaybeSeconds) -> str | None:
        self._refuse_to_meet_itself()
        waits = self.limit == 1 and timeout != 0
        if self.limit > 1:
            statement = statements.take_slots(tuple([key.slots(self.limit) for key in self.keys]), xact=True)
        elif waits:
            statement = statements.take_waiting(self.keys, shared=self.shared, xact=True, timeout=timeout)
        else:
            statement = statements.take_at_once(self.keys, shared=self.shared, xact=True)
        # A refusal aborts a transaction, and only a savepoint gives partial gains back.
        fragile = hold.transaction is None and (waits or len(self.keys) > 1)
        connection = connections[self.using]
        try:
            with transaction.atomic(self.using) if fragile else nullcontext():
                with connection.cursor() as cursor:
                    cursor.execute(*self._labelled(statement, owner))
                    is_standby, *_, answer = cursor.fetchone()
                if is_standby:
                    raise on_standby(self.using)
                if fragile and not answer:
                    transaction.set_rollback(rollback=True, using=self.using)
        except DatabaseError as error:
            if reason := REFUSALS.get(type(error.__cause__)):
                return reason
            if waits and isinstance(error.__cause__, QueryCanceled):
                return f"{ENDED}: {str(error).strip()}"
            raise
        except BaseException:
            if connection.connection is not None:
                cancel(connection.connection)
            raise
        if not answer:
            return TAKEN
        hold.keys = self.keys
        return None

    def _refuse_to_meet_itself(self) -> None:
        """A transaction-level lock is on another session than the session-level ones of the same thread."""
        session = pool().leased.get(self.using)
        if session is None or self.limit > 1 or not session.is_still_there():
            return
        mine = session.held_among(self.keys, shared=False)
        if mine is None and not self.shared:
            mine = session.held_among(self.keys, shared=True)
        if mine is not None:
            raise LockMisuse(
                f"This thread holds {mine.name!r} by a session-level lock, so it would wait for itself: its "
                f"transaction-level locks are on another session. Take both at the same level."
            )

    def _labelled(self, statement: Statement, owner: Owner) -> tuple[str, tuple[Any, ...]]:
        """The statement with what tells a task's transaction from others, to the end of the transaction."""
        if not owner.task_id:
            return f"SELECT pg_is_in_recovery(), {statement.select}", statement.parameters
        holdings = [Holding(key, None) for key in self.keys]
        comment = labels.comment(owner, holdings, show_names=current().SHOW_NAMES)
        name = labels.application_name(labels.WORK_CONNECTION, owner.task_id)
        columns = f"pg_is_in_recovery(), set_config('application_name', %s, true), {statement.select}"
        return f"{comment.replace('%', '%%')} SELECT {columns}", (name, *statement.parameters)

    def _timeout_in_force(self) -> float | None:
        if self.xact:
            with connections[self.using].cursor() as cursor:
                cursor.execute(LOCK_TIMEOUT_IN_FORCE)
                in_force = cursor.fetchone()[0]
        else:
            session = pool().lease(self.using, NOBODY)
            try:
                in_force = session.rows(LOCK_TIMEOUT_IN_FORCE, [])[0][0]
            finally:
                pool().give_back(session)
        return in_force or None
