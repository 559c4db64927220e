"""The database session a lock lives on, and dies with."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from django.db import DatabaseError, OperationalError

from celery_pglock import clocks, fences, statements
from celery_pglock.config import current
from celery_pglock.durations import MaybeSeconds
from celery_pglock.errors import LockLost, LockMisuse
from celery_pglock.fences import Handover, Token
from celery_pglock.inventories import Inventory, names
from celery_pglock.keys import Key
from celery_pglock.labels import NOBODY, Holding, Owner
from celery_pglock.lifelines import BEAT, Lifeline
from celery_pglock.raw_connections import connect
from celery_pglock.statements import Statement
from celery_pglock.voices import NoRoom, Refused, Voice, application_name, no_table

logger = logging.getLogger(__name__)

# How long a session that holds nothing is kept, in seconds; at most half of its lease.
IDLE_SECONDS = 10.0

# Seconds after which a session that was laid by may have been ended by the server.
MOMENT = 0.001

# As many as a label of usual names has room for.
MOST_SLOTS_NAMED = 8

# How often whoever has to know of a loss is told, until it has taken note, in seconds. While it waits for
# PostgreSQL psycopg looks at signals every 0.1 s, counted anew from each signal: so less often than that.
TELL_EVERY = 0.3

SILENT = "the server has not been heard for too long"

OWN_LOCKS = """
SELECT objsubid, classid::bigint, objid::bigint FROM pg_locks
WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND granted AND mode = %s
"""


def check_alias(alias: str, *, strict: bool) -> None:
    """Connect, and refuse an alias through which session-level locks would not exclude.

    With ``strict`` also one that cannot keep tokens. Raises ``LockMisuse`` and Django's errors.
    """
    session = LockSession(alias, NOBODY)
    try:
        if strict:
            ((may_keep_tokens,),) = session.rows(fences.MAY_KEEP_TOKENS, [])
            if may_keep_tokens is None:
                raise no_table(alias)
            if not may_keep_tokens:
                raise LockMisuse(
                    f"Strict locks write a row for each key, which the role of alias {alias!r} may not: it "
                    f"needs {fences.RIGHTS}."
                )
    finally:
        session.close()


def mode(*, shared: bool) -> str:
    """The lock's mode as ``pg_locks`` names it."""
    return "ShareLock" if shared else "ExclusiveLock"


class Gain(NamedTuple):
    """What one acquisition brought: the keys, their tokens if it was a strict one, and what it found."""

    keys: tuple[Key, ...]
    tokens: Mapping[Key, Token]
    handover: Handover | None = None


class LockSession:
    """A PostgreSQL session apart from Django's connections, used by one thread at a time.

    It counts what it holds, because a thread re-enters its own locks. PostgreSQL's errors are raised as
    Django's. After anything that leaves its state in doubt it is closed, and never used again.
    """

    def __init__(self, alias: str, owner: Owner) -> None:
        self.alias = alias
        # A forked child must not speak on its parent's socket: hence the pid.
        self.process: int = os.getpid()
        # Who must know that the session is lost; called by the watcher, time and again, with the reason.
        self.to_be_told: list[Callable[[str], None]] = []
        self._held = Inventory()
        self._idle_since: float | None = None
        self._is_loss_logged = False
        settings = current()
        connection = connect(alias, application_name(owner), settings.lease)
        self._line = Lifeline(alias, connection.psycopg, connection.backend_pid, settings.lease)
        self._voice = Voice(self._line, owner, connection.mark)

    def __del__(self) -> None:
        # A thread that ends takes its sessions with it.
        if "_line" in vars(self) and self.is_ours and not self.is_closed:
            self._line.close()

    @property
    def is_ours(self) -> bool:
        return self.process == os.getpid()

    @property
    def is_closed(self) -> bool:
        return self._line.is_closed

    @property
    def is_believed(self) -> bool:
        """Whether the server cannot have ended it yet, as far as is known without asking."""
        return self._line.is_believed

    @property
    def is_watched(self) -> bool:
        """Whether a watcher has something to do for it."""
        return self.is_ours and (not self.is_closed or bool(self.to_be_told))

    @property
    def backend_pid(self) -> int:
        return self._line.backend_pid

    @property
    def lease(self) -> float:
        return self._line.lease

    @property
    def loss(self) -> str:
        """Why it was given up; empty while it is not."""
        return self._line.loss

    @property
    def socket(self) -> int:
        return self._line.socket

    @property
    def sockets(self) -> list[int]:
        """Every descriptor that would keep its connection open; none once it is closed."""
        return self._line.sockets

    @property
    def events(self) -> int:
        """What may happen on its socket; 0 if nothing of interest."""
        return 0 if self.is_closed or self.loss else self._line.events

    @property
    def holds_nothing(self) -> bool:
        return not self._held

    @property
    def counts(self) -> Counter[tuple[Key, bool]]:
        """How often it holds which key; with True for the shared mode."""
        return self._held.counts

    def held_among(self, keys: Iterable[Key], *, shared: bool) -> Key | None:
        """The first of these keys that this session holds in this mode."""
        return next((key for key in keys if self._held.has(key, shared=shared)), None)

    def holds_others_than(self, keys: Iterable[Key]) -> bool:
        """Whether it holds something, but not all of these keys already."""
        return bool(self._held) and not self._held.has_all(keys)

    def is_still_there(self) -> bool:
        """Whether it is believed, and ours; knows of its end from what came unasked, without asking."""
        if not self.is_ours:
            return False
        with self._line.speaking:
            self._line.read_what_came_unasked()
        return self.is_believed

    def check(self) -> None:
        """Raise ``LockLost`` if it holds something that is gone."""
        if not self._held:
            return
        with self._line.speaking:
            self._line.read_what_came_unasked()
        if not self.is_believed:
            lost = ", ".join(holding.key.name for holding in self._held.holdings())
            self._line.lose(SILENT)
            self.close()
            raise LockLost(lost, self.loss)

    def take(
        self, keys: Sequence[Key], *, shared: bool, timeout: MaybeSeconds, strict: bool = False
    ) -> Gain | None:
        """Take all keys in this order or none; a key that is held already is only counted.

        Raises ``Refused`` where PostgreSQL did, and ``NoRoom``.
        """
        with self._line.speaking:
            if self._held:
                self.check()
            fresh = tuple([key for key in keys if not self._held.has(key, shared=shared)])
            without_token = [key for key in keys if key not in self._held.tokens] if strict else ()
            found: Handover | None = None
            try:
                if fresh or without_token:
                    row = self._take(fresh, without_token, shared=shared, timeout=timeout)
                    if row is None:
                        return None
                    found = self._note_tokens(without_token, row)
                self._held.put_in(keys, shared=shared)
            except (Refused, NoRoom):
                self._give_back_gains(fresh, shared=shared, strict=strict)
                raise
            except BaseException:
                self.abandon()
                raise
            tokens = {key: self._held.tokens[key] for key in keys} if strict else {}
            return Gain(tuple(keys), tokens, found)

    def take_slots(self, slots_by_key: Sequence[tuple[Key, ...]]) -> Gain | None:
        """Take one free slot of every key, or none; the gain's keys are the slots taken.

        A key of which this session holds a slot already is only counted. Raises ``NoRoom``.
        """
        with self._line.speaking:
            self.check()
            held = [self.held_among(slots, shared=False) for slots in slots_by_key]
            fresh = tuple([slots for slots, mine in zip(slots_by_key, held, strict=True) if mine is None])
            numbers: Iterable[int] | None = ()
            try:
                if fresh:
                    statement = self._voice.telling(statements.take_slots(fresh, xact=False))
                    # Which of them it will be nobody knows, and a label is believed only for what is held.
                    candidates = [slot for slots in fresh for slot in slots[:MOST_SLOTS_NAMED]]
                    numbers = self._voice.answer(statement, self._held.holdings(candidates))[-1]
                if numbers is None:
                    return None
                gained = [slots[number] for slots, number in zip(fresh, numbers, strict=True)]
                taken = tuple(mine or gained.pop(0) for mine in held)
                self._held.put_in(taken, shared=False)
            except NoRoom:
                self._give_back_gains([slot for slots in fresh for slot in slots], shared=False, strict=True)
                raise
            except BaseException:
                self.abandon()
                raise
            return Gain(taken, {})

    def give_back(self, keys: Sequence[Key], *, shared: bool, in_order: bool = True) -> bool:
        """Give back one acquisition of these keys; answers whether they had been kept to the end.

        With ``in_order`` the next strict holder need not wait for anybody to have given up.
        """
        if not self.is_ours:
            return True
        with self._line.speaking:
            if not self._line.is_believed:
                self._line.lose(SILENT)
                self.close()
                return False
            try:
                kept = self._give_back(keys, shared=shared, in_order=in_order)
                if not kept:
                    logger.warning("PostgreSQL says that this session did not hold %s", names(keys))
                    self.abandon()
            except (DatabaseError, LockMisuse) as error:
                logger.warning("Releasing %s failed: %s", names(keys), error)
                self.abandon()
                return False
            except BaseException:
                self.abandon()
                raise
            return kept

    def rows(self, sql: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """The rows of a statement that takes nothing and gives nothing back."""
        with self._line.speaking:
            try:
                return self._voice.rows(sql, parameters, self._held.holdings())
            except BaseException:
                # An error that the server told changes nothing of what the session holds.
                if not self._line.is_idle:
                    self.abandon()
                raise

    def lay_by(self) -> None:
        """Keep it for whoever needs a session next."""
        if statement := self._voice.no_longer_telling():
            self._give_back_marker(statement)
        self.to_be_told.clear()
        self._idle_since = clocks.now()

    def take_up(self, owner: Owner) -> bool:
        """Use it after it was laid by; False if the server has ended it meanwhile."""
        with self._line.speaking:
            # What came in the last moment the next statement meets, and nothing is lost by that.
            if self._idle_since is None or clocks.now() - self._idle_since >= MOMENT:
                self._line.read_what_came_unasked()
            if not self._line.is_believed:
                self._line.close()
                return False
            self._voice.works_for(owner)
            self._idle_since = None
            return True

    def tend(self) -> float:
        """What a watcher does for it, without ever waiting; answers after how many seconds to do so again."""
        if not (self.loss or self.is_closed):
            self._line.listen(self._beat if self._held else None)
        # Another thread may take it up at any moment.
        if (idle_since := self._idle_since) is not None:
            return self._close_if_overdue(idle_since)
        if not self.loss:
            return min(self._line.patience if self._held else BEAT * self.lease, BEAT * self.lease / 2)
        self._log_the_loss()
        for tell in tuple(self.to_be_told):
            tell(self.loss)
        return TELL_EVERY

    def lose(self, reason: str) -> None:
        """Give it up, with all that it holds."""
        self._line.lose(reason)

    def cut_off(self, reason: str) -> None:
        """Give it up for its owner, which is another thread: the server frees at once what it holds."""
        self._line.cut_off(reason)

    def close(self) -> None:
        """End the session; what it still held is lost to those who believe that they hold it."""
        if self._held:
            self._line.lose("it was closed")
            self._log_the_loss()
        self._held.clear()
        if self.is_ours:
            self._line.close()

    def abandon(self) -> None:
        """Close it in the middle of whatever it does, so that nothing is granted to it later."""
        if self.is_ours:
            self._line.close()
        self.close()

    def _take(
        self,
        fresh: tuple[Key, ...],
        without_token: Sequence[Key],
        *,
        shared: bool,
        timeout: MaybeSeconds,
    ) -> Sequence[Any] | None:
        """The columns that tell of the handover, if the fresh keys were taken."""
        waits = bool(fresh) and timeout != 0
        wait: float | None = 0.0
        if not fresh:
            statement = Statement(("true",))
        elif waits:
            statement = statements.take_waiting(fresh, shared=shared, xact=False, timeout=timeout)
            wait = timeout if isinstance(timeout, float | int) else None
        else:
            statement = statements.take_at_once(fresh, shared=shared, xact=False)
        statement = self._voice.telling(statement)
        if without_token:
            statement = fences.take(statement, without_token, self._voice.owner.task_id, self.lease)
            wait = None if wait is None else wait + fences.row_timeout(self.lease)
        holdings = self._held.holdings(fresh)
        row = self._voice.answer(statement, holdings, wait=wait)
        if not row[-1]:
            return None
        if self._line.is_silent:
            self._voice.be_heard(holdings)
        if not self._line.is_believed:
            raise OperationalError("The server's answer came so late that the lock may be lost already.")
        return row

    def _note_tokens(self, keys: Sequence[Key], row: Sequence[Any]) -> Handover | None:
        if not keys:
            return None
        found = fences.handover(row)
        self._held.tokens |= dict.fromkeys(keys, found.token)
        return found

    def _give_back(self, keys: Sequence[Key], *, shared: bool, in_order: bool) -> bool:
        last = self._held.last_of(keys, shared=shared)
        kept: bool | None = True
        if last:
            remaining = self._held.holdings_without(last, shared=shared)
            statement = self._voice.guarded(statements.give_back(last, shared=shared))
            tokens = self._held.take_out_tokens(last)
            kept = self._leave_in_order(statement, tokens, remaining) if tokens and in_order else None
            if kept is None:
                kept = self._voice.answer(statement, remaining)[-1]
        self._held.take_out(keys, shared=shared)
        return bool(kept)

    def _give_back_marker(self, statement: Statement) -> None:
        try:
            self.rows(f"SELECT {statement.select}", statement.parameters)
        except DatabaseError as error:
            logger.warning("A lock session is closed with the marker of its task: %s", str(error).strip())
            self.abandon()

    def _leave_in_order(
        self, statement: Statement, tokens: Mapping[Key, Token], remaining: Sequence[Holding]
    ) -> bool | None:
        """Give back and tell so in the rows; ``None`` if it could not be told, and nothing was given back."""
        try:
            return bool(
                self._voice.answer(
                    fences.give_back(statement, tokens, self.lease),
                    remaining,
                    wait=fences.row_timeout(self.lease),
                )[-1]
            )
        except (Refused, DatabaseError) as error:
            if not self._line.is_idle:
                raise
            logger.warning(
                "The next strict holder of %s will wait, as this one could not tell that it left: %s",
                names(tokens),
                str(error).strip(),
            )
            return None

    def _beat(self) -> str:
        return self._voice.beat(self._held.holdings())

    def _close_if_overdue(self, idle_since: float) -> float:
        left = idle_since + min(IDLE_SECONDS, self.lease / 2) - clocks.now()
        if (left <= 0 or self.loss) and self._line.speaking.acquire(blocking=False):
            try:
                if self._idle_since is not None:
                    self._line.close()
            finally:
                self._line.speaking.release()
        return max(left, 0.05)

    def _log_the_loss(self) -> None:
        if self._held and not self._is_loss_logged:
            self._is_loss_logged = True
            logger.error("The session that keeps %s is lost: %s", self._held, self.loss)

    def _give_back_gains(self, fresh: Sequence[Key], *, shared: bool, strict: bool) -> None:
        # A session-level lock survives the error of the statement that took it. Which ones were taken
        # before the refusal only the server knows.
        if len(fresh) == 1 and not strict:
            return
        rows = set(self.rows(OWN_LOCKS, [mode(shared=shared)]))
        gains = [key for key in fresh if (key.objsubid, key.classid, key.objid) in rows]
        if gains:
            self._held.put_in(gains, shared=shared)
            self.give_back(gains, shared=shared)
