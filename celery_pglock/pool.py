"""The lock sessions of this process, each leased to one thread or greenlet at a time."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable

from django.core import mail

from celery_pglock.labels import Owner
from celery_pglock.sessions import LockSession

logger = logging.getLogger(__name__)

IDLE_SECONDS = 10.0


class Pool:
    """Sessions that nobody uses, newest first, and those that each thread has leased."""

    def __init__(self) -> None:
        # Re-entrant, as garbage collected under it may be a generator that gives a lock back.
        self._lock = threading.RLock()
        self._idle: deque[tuple[float, LockSession]] = deque()
        self._closer: threading.Thread | None = None
        # Per thread, or per greenlet where gevent has patched it: a dead thread's sessions close with it.
        self._leases = threading.local()

    @property
    def leased(self) -> dict[str, LockSession]:
        """The sessions of the calling thread, by alias."""
        leased: dict[str, LockSession] | None = getattr(self._leases, "by_alias", None)
        if leased is None:
            leased = self._leases.by_alias = {}
        return leased

    def lease(self, alias: str, owner: Owner) -> LockSession:
        """This thread's session on the alias: the one it has, an idle one, or a new one."""
        session = self.leased.get(alias)
        if session is None or (session.is_closed and session.holds_nothing):
            session = self._idle_session(alias) or LockSession(alias, owner)
            session.owner = owner
            self.leased[alias] = session
        return session

    def give_back(self, session: LockSession) -> None:
        """Take a session back if it holds nothing any more; one that is closed is forgotten."""
        if not session.holds_nothing or self.leased.get(session.alias) is not session:
            return
        del self.leased[session.alias]
        session.owner = Owner()
        if session.is_closed or not session.is_ours:
            return
        if hasattr(mail, "outbox"):
            # Django's test environment: an idle session would keep the test database from being dropped.
            session.close()
            return
        with self._lock:
            self._idle.append((time.monotonic(), session))
            if self._closer is None or not self._closer.is_alive():
                closer = threading.Thread(target=self._close_overdue, name="celery_pglock-idle", daemon=True)
                try:
                    closer.start()
                except RuntimeError:
                    # No thread can be started: at the limit of threads, or as the interpreter ends.
                    self.close_idle()
                else:
                    self._closer = closer

    def close_idle(self) -> None:
        with self._lock:
            sessions = [session for _, session in self._idle]
            self._idle.clear()
        for session in sessions:
            session.close()

    def _idle_session(self, alias: str) -> LockSession | None:
        with self._lock:
            mine = [entry for entry in self._idle if entry[1].alias == alias]
            for entry in reversed(mine):
                self._idle.remove(entry)
                if entry[1].is_alive:
                    return entry[1]
                entry[1].close()
        return None

    def _close_overdue(self) -> None:
        while True:
            with self._lock:
                overdue = []
                while self._idle and self._idle[0][0] + IDLE_SECONDS <= time.monotonic():
                    overdue.append(self._idle.popleft()[1])
                if not self._idle:
                    self._closer = None
                wake_in = self._idle[0][0] + IDLE_SECONDS - time.monotonic() if self._idle else None
            for session in overdue:
                session.close()
            if wake_in is None:
                return
            time.sleep(max(wake_in, 0))


_pool = Pool()
_inherited: list[Pool] = []


def pool() -> Pool:
    """The pool of this process."""
    return _pool


def _begin_anew_in_a_child() -> None:
    # What a child inherits is kept aside and never touched: closing it would end its parent's sessions.
    global _pool
    _inherited.append(_pool)
    _pool = Pool()


os.register_at_fork(after_in_child=_begin_anew_in_a_child)


def close_leftovers(task: str, but: Iterable[LockSession] = ()) -> bool:
    """Close this thread's sessions ``but`` some, when the task that leased them has ended."""
    leftovers = [session for session in pool().leased.values() if session not in but]
    for session in leftovers:
        if not session.holds_nothing:
            logger.warning("%s ended with locks on alias %r; its lock session is closed", task, session.alias)
        session.close()
        del pool().leased[session.alias]
    return bool(leftovers)


@atexit.register
def close_idle() -> None:
    pool().close_idle()
