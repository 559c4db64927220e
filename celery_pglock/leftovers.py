"""What a test leaves of lock sessions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress

from django.db import DatabaseError

from celery_pglock import lock_sequences, locks
from celery_pglock.labels import Owner
from celery_pglock.pool import close_leftovers, pool
from celery_pglock.sessions import LockSession

# How long a task in another thread may take to end, and the server to let go, in seconds.
PATIENCE = 1.0
LONGEST_FAREWELL = 5.0

PAUSE = 0.01

BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"


class LocksLeftBehind(UserWarning):
    """A test ended with locks, which the next one would have met."""


def in_use() -> list[LockSession]:
    """The lock sessions of this process that somebody uses, in whatever thread."""
    return pool().in_use()


def clear_away(left_by: str, but: Collection[LockSession] = ()) -> None:
    """Close all lock sessions ``but`` some, and warn of what they still held; ``left_by`` is whose they were.

    When it returns the server has let go of them.
    """
    pool().close_idle()
    mine = [session for session in pool().leased.values() if session not in but]
    others = _still_used_after_a_while([session for session in in_use() if session not in [*mine, *but]])
    left = [*mine, *others]
    if not left:
        return
    held = ", ".join(filter(None, [session.held for session in left]))
    what = f"the locks {held} behind" if held else "somebody behind who waits for a lock"
    close_leftovers(left_by, but)
    for session in others:
        session.cut_off(f"{left_by} has ended")
    locks.forget_what_was_left()
    lock_sequences.forget_what_was_left()
    _wait_for_the_server(left)
    warnings.warn(f"{left_by} left {what}: its lock sessions were closed", LocksLeftBehind, stacklevel=3)


def _still_used_after_a_while(sessions: Sequence[LockSession]) -> list[LockSession]:
    over = time.monotonic() + PATIENCE
    while (used := [session for session in sessions if session in in_use()]) and time.monotonic() < over:
        time.sleep(PAUSE)
    return used


def _wait_for_the_server(sessions: Sequence[LockSession]) -> None:
    for alias in {session.alias for session in sessions}:
        pids = [session.backend_pid for session in sessions if session.alias == alias]
        over = time.monotonic() + LONGEST_FAREWELL
        # A server that does not answer has nothing that the next test could meet.
        with suppress(DatabaseError):
            session = pool().new_session(alias, Owner())
            try:
                while session.rows(BACKENDS, [pids]) != [(0,)] and time.monotonic() < over:
                    time.sleep(PAUSE)
            finally:
                session.close()
