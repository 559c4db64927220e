"""The lock sessions of this process, each leased to one thread or greenlet at a time."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Iterable

from django.core import mail

from celery_pglock.labels import Owner
from celery_pglock.sessions import LockSession
from celery_pglock.watchers import Watcher

logger = logging.getLogger(__name__)


class Pool:
    """Sessions that nobody uses, newest last, and those that each thread has leased."""

    def __init__(self) -> None:
        # Re-entrant, as garbage collected under it may be a generator that gives a lock back.
        self._lock = threading.RLock()
        self._idle: list[LockSession] = []
        self._watcher = Watcher()
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
        if session is None or (session.holds_nothing and not session.is_believed):
            session = self._idle_session(alias, owner) or self.new_session(alias, owner)
            self.leased[alias] = session
        return session

    def give_back(self, session: LockSession) -> None:
        """Take a session back if it holds nothing any more; one that is lost is forgotten."""
        if not session.holds_nothing or self.leased.get(session.alias) is not session:
            return
        del self.leased[session.alias]
        if not session.is_ours:
            return
        # In Django's test environment an idle session would keep the test database from being dropped.
        if "outbox" in vars(mail) or session.is_closed:
            session.close()
            return
        session.lay_by()
        with self._lock:
            self._idle = [idle for idle in self._idle if not idle.is_closed]
            self._idle.append(session)

    def new_session(self, alias: str, owner: Owner) -> LockSession:
        """A session of its caller's own, who closes it."""
        session = LockSession(alias, owner)
        try:
            self._watcher.watch(session)
        except BaseException:
            # Without a watcher the server would end it.
            session.close()
            raise
        return session

    def in_use(self) -> list[LockSession]:
        """Those that somebody uses, in whatever thread."""
        with self._lock:
            idle = list(self._idle)
        return [one for one in self._watcher.sessions if not one.is_closed and one not in idle]

    def inherited_sockets(self) -> list[int]:
        """The descriptors of all sessions, for a child that must not keep them open."""
        return self._watcher.inherited_sockets()

    def close_idle(self) -> None:
        with self._lock:
            sessions, self._idle = self._idle, []
        for session in sessions:
            session.close()

    def _idle_session(self, alias: str, owner: Owner) -> LockSession | None:
        with self._lock:
            for position in reversed(range(len(self._idle))):
                if self._idle[position].alias == alias:
                    session = self._idle.pop(position)
                    if session.take_up(owner):
                        return session
        return None


_pool = Pool()
_inherited: list[Pool] = []


def pool() -> Pool:
    """The pool of this process."""
    return _pool


def _begin_anew_in_a_child() -> None:
    # What a child inherits is kept aside and never used: closing it would end its parent's sessions. The
    # sockets themselves lead nowhere from now on, or they would keep the sessions of a parent that dies.
    global _pool
    _inherited.append(_pool)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for socket in _pool.inherited_sockets():
        os.dup2(nowhere, socket, inheritable=False)
    os.close(nowhere)
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
