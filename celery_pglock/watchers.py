"""The one thread of a process that watches its lock sessions."""

from __future__ import annotations

import logging
import os
import threading
import weakref

from celery_pglock import polls, undisturbed
from celery_pglock.sessions import LockSession

logger = logging.getLogger(__name__)


class Watcher:
    """Keeps sessions alive, closes those that idle for too long, and tells of those that are lost.

    Its thread runs while there is a session to watch.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # Weak, because the sessions of a thread that has ended close with it.
        self._sessions: weakref.WeakSet[LockSession] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._woken, self._wake = -1, -1

    def watch(self, session: LockSession) -> None:
        """Watch the session until it is closed; RuntimeError where no thread can be started."""
        with self._lock:
            self._sessions.add(session)
            if self._thread is None or not self._thread.is_alive():
                self._start()
            else:
                self._call()

    @property
    def sessions(self) -> list[LockSession]:
        """All that are watched."""
        with self._lock:
            return [session for session in self._sessions if session.is_watched]

    def inherited_sockets(self) -> list[int]:
        """The descriptors of all its sessions, for a child that must not keep them open."""
        return [socket for session in self._sessions for socket in session.sockets]

    def _start(self) -> None:
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        thread = threading.Thread(target=self._run, name="celery_pglock-watcher", daemon=True)
        self._thread = thread
        try:
            undisturbed.start(thread)
        finally:
            if not thread.is_alive():
                self._thread = None
                self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._woken)
        os.close(self._wake)

    def _run(self) -> None:
        while sessions := self._sessions_to_watch():
            pause = min([_tend(session) for session in sessions])
            sockets = [(session.socket, session.events) for session in sessions]
            # A reference would keep the session of a thread that ends.
            del sessions
            events = {socket: events for socket, events in sockets if socket >= 0 and events}
            if polls.wait({**events, self._woken: polls.READABLE}, pause):
                self._forget_the_call()

    def _sessions_to_watch(self) -> list[LockSession]:
        with self._lock:
            sessions = [session for session in self._sessions if session.is_watched]
            self._sessions = weakref.WeakSet(sessions)
            if not sessions:
                self._close_pipe()
                self._thread = None
            return sessions

    def _call(self) -> None:
        try:
            os.write(self._wake, b"!")
        except BlockingIOError:
            # It has been called often enough.
            return

    def _forget_the_call(self) -> None:
        try:
            os.read(self._woken, 1000)
        except BlockingIOError:
            # It was a session that had something to tell.
            return


def _tend(session: LockSession) -> float:
    try:
        return session.tend()
    except Exception as error:
        # A session that nobody watches must not be believed in.
        logger.exception("Watching a lock session failed, so it is given up")
        session.lose(f"watching it failed: {error}")
        return 0
