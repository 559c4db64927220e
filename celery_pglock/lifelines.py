"""The line to a lock session's server, and whether its holder may still believe in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import psycopg
from django.db import OperationalError, connections
from psycopg.pq import ExecStatus, TransactionStatus

from celery_pglock import polls
from celery_pglock.clocks import now
from celery_pglock.raw_connections import cancel, shut_down
from celery_pglock.wires import Wire

# Fractions of the lease: how often a holder makes itself heard, and after which silence it gives up. The
# server ends the session after a whole one, which it counts from later than the holder does.
BEAT: Final = 1 / 6
GIVE_UP: Final = 0.6

# Through a pooler that is not in session mode.
WHO_ANSWERS: Final = "SELECT pg_backend_pid()"
ANOTHER_BACKEND: Final = "another backend answered than the one that keeps it"


class Lifeline:
    """A connection on which one thread speaks at a time, while a watcher listens.

    ``lease`` is in seconds: the server ends a session that has been silent for so long, and its holder gives
    it up before that. ``loss`` says why it was given up; empty while it is not.

    Whoever speaks holds ``speaking``: its owner for as long as a statement takes, the watcher only to send a
    beat or to read its answer, without ever waiting. Giving the session up takes no lock, nor does looking at
    the descriptor, which is open until ``close()``.
    """

    def __init__(
        self, alias: str, connection: psycopg.Connection[Any], backend_pid: int, lease: float
    ) -> None:
        self.alias = alias
        self.connection = connection
        self.backend_pid = backend_pid
        self.lease = lease
        self.loss: str = ""
        # Held while anybody uses the connection: libpq is not made for two threads.
        self.speaking: threading.RLock = threading.RLock()
        # A descriptor of our own, because libpq closes its own as it likes, and its number goes to others.
        self.socket: int = os.dup(connection.fileno())
        self._wire = Wire(connection)
        self._closing = threading.Lock()
        self._gives_up_after = GIVE_UP * lease
        self._arrivals = polls.Watch(self.socket, polls.READABLE)
        self._heard_at = now()
        self._is_asking = False
        self._answer_by: float | None = None
        self._beat_at: float | None = None

    @property
    def is_closed(self) -> bool:
        return self.connection.closed

    @property
    def sockets(self) -> list[int]:
        """All the descriptors of the connection; none once it is closed."""
        # Without a lock: a forked child asks, in which nobody is left to give one back.
        return [] if self.is_closed or self.socket < 0 else [self.socket, self.connection.fileno()]

    @property
    def patience(self) -> float:
        """Seconds after which there is something to do for a session that holds something."""
        until_beat = BEAT * self.lease - self._silence
        return until_beat if until_beat > 0 else max(GIVE_UP * self.lease - self._silence, 0.0)

    @property
    def is_believed(self) -> bool:
        """Whether the server cannot have ended the session yet, as far as is known without asking it."""
        return not (self.loss or self.connection.closed or now() - self._heard_at >= self._gives_up_after)

    @property
    def is_silent(self) -> bool:
        """Whether it is time to be heard; the silence is counted from the beginning of the last statement."""
        return self._silence >= BEAT * self.lease

    @property
    def is_idle(self) -> bool:
        return self.connection.pgconn.transaction_status == TransactionStatus.IDLE

    @property
    def events(self) -> int:
        """What the watcher waits for on the socket."""
        return polls.ENDED if self._beat_at is None else polls.ENDED | polls.READABLE

    @property
    def _silence(self) -> float:
        return now() - self._heard_at

    def ask(
        self, sql: str, parameters: Sequence[object], *, label: str = "", wait: float | None = 0
    ) -> list[tuple[Any, ...]]:
        """The rows of a statement that may take the server ``wait`` seconds; ``None`` sets no bound.

        ``label`` stands before it. Raises Django's errors. If the server does not answer in time the watcher
        shuts the line down, which is an OperationalError here.
        """
        return self._bounded(wait, self._wire.ask, sql, parameters, label)

    def ask_again(
        self, sql: str, parameters: Sequence[int | str], *, label: str, wait: float | None
    ) -> list[tuple[Any, ...]]:
        """As ``ask()`` for a statement with parameters that is asked often: the server plans it once."""
        return self._bounded(wait, self._wire.ask_again, sql, parameters, label)

    def _bounded(
        self, wait: float | None, ask: Callable[..., list[tuple[Any, ...]]], *question: Any
    ) -> list[tuple[Any, ...]]:
        if self._beat_at is not None:
            self._await_beat()
        if self.loss:
            raise OperationalError(f"The lock session is lost: {self.loss}.")
        sent = now()
        self._answer_by = None if wait is None else sent + wait + self._gives_up_after
        self._is_asking = True
        try:
            rows = ask(*question)
        except psycopg.Error as error:
            # A refusal is an answer, too.
            if error.sqlstate and not self.is_closed:
                self._heard_at = sent
            # Asked for each time: Django's wrapper belongs to a thread, and a session goes between them.
            with connections[self.alias].wrap_database_errors:
                raise
        finally:
            self._is_asking = False
            self._answer_by = None
        self._heard_at = sent
        return rows

    def ask_who_answers(self, label: str) -> None:
        """Make the session heard, or give it up."""
        ((backend_pid,),) = self.ask(WHO_ANSWERS, (), label=label)
        if backend_pid != self.backend_pid:
            self.lose(ANOTHER_BACKEND)

    def lose(self, reason: str) -> None:
        """Give the session up; the first reason stays."""
        self.loss = self.loss or reason

    def cut_off(self, reason: str) -> None:
        """End it at once from another thread than its owner's, who may be waiting for an answer."""
        self.lose(reason)
        self._shut_down()

    def listen(self, beat: Callable[[], str] | None) -> None:
        """Notice the end, make the session heard with the statement ``beat``, or give it up; never waits.

        ``beat`` is None where there is nothing to lose, and asked while nobody else speaks.
        """
        # Whoever speaks may be done at any moment, and take it away.
        answer_by = self._answer_by
        if self._has_ended():
            self.lose("the server ended it")
        elif answer_by is not None and now() > answer_by:
            self.lose(self._how_silent())
            self._shut_down()
        elif beat is not None and self._silence >= GIVE_UP * self.lease:
            self.lose(self._how_silent())
            if self._is_asking:
                self._shut_down()
        elif self.speaking.acquire(blocking=False):
            try:
                self._beat(beat)
            except psycopg.Error as error:
                self.lose(str(error).strip())
            finally:
                self.speaking.release()

    def read_what_came_unasked(self) -> None:
        """News of a setting that was reloaded, or the server's farewell."""
        try:
            while not self.connection.closed and self._arrivals.has_happened():
                self.connection.pgconn.consume_input()
        except psycopg.OperationalError as error:
            self.lose(str(error).strip())

    def close(self) -> None:
        """End the session at once, whatever it may be doing."""
        with self.speaking:
            if self._beat_at is None and not self.loss:
                cancel(self.connection, checks_its_client=True)
            with self._closing:
                self.connection.close()
                own, self.socket = self.socket, -1
                if own >= 0:
                    # A watcher that polls the socket right now keeps it open, and the server in the dark.
                    with suppress(OSError):
                        shut_down(own)
                    os.close(own)

    def _beat(self, beat: Callable[[], str] | None) -> None:
        if self._beat_at is not None:
            self._hear()
        elif beat is not None and self.is_silent and self.is_idle:
            sent = now()
            self.connection.pgconn.send_query(beat().encode())
            self.connection.pgconn.flush()
            self._beat_at = sent

    def _await_beat(self) -> None:
        while self._beat_at is not None and not self.loss:
            try:
                # The answer may have been read already, and then the socket says nothing of it.
                self._hear()
            except psycopg.OperationalError as error:
                self.lose(str(error).strip())
                return
            left = GIVE_UP * self.lease - self._silence
            if self._beat_at is not None and (
                left <= 0 or not polls.wait({self.socket: polls.READABLE}, left)
            ):
                self.lose(self._how_silent())

    def _hear(self) -> None:
        pgconn = self.connection.pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                assert self._beat_at is not None
                self._heard_at, self._beat_at = self._beat_at, None
                return
            if result.status != ExecStatus.TUPLES_OK:
                self.lose(result.error_message.decode(errors="replace").strip())
            elif result.get_value(0, 0) != str(self.backend_pid).encode():
                self.lose(ANOTHER_BACKEND)

    def _has_ended(self) -> bool:
        with self._closing:
            return self.socket < 0 or polls.look({self.socket: polls.ENDED})

    def _shut_down(self) -> None:
        # Whoever waits for the answer is woken by this; closing would pull the descriptor from under them.
        with self._closing, suppress(OSError):
            if self.socket >= 0:
                shut_down(self.socket)

    def _how_silent(self) -> str:
        return f"the server has not been heard for {self._silence:.1f} s"
