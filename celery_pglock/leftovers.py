"""What a test leaves of lock sessions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TypeAlias

from django.db import DatabaseError

from celery_pglock import lock_sequences, locks
from celery_pglock.inventories import names
from celery_pglock.keys import Key
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


Counts: TypeAlias = "Counter[tuple[Key, bool]]"

NOTHING: Mapping[LockSession, Counts] = MappingProxyType({})


def in_use() -> dict[LockSession, Counts]:
    """The lock sessions of this process that somebody uses, in whatever thread, and what they hold."""
    return {session: session.counts for session in pool().in_use()}


def clear_away(left_by: str, before: Mapping[LockSession, Counts] = NOTHING) -> LocksLeftBehind | None:
    """Close the lock sessions of this process; gives what tells of the locks that they still held.

    ``left_by`` is who left them. Sessions in use ``before`` stay, without what this thread has taken on them
    since. When it returns, the server has let go of the others.
    """
    pool().close_idle()
    surplus = {
        session: session.counts - before[session] for session in pool().leased.values() if session in before
    }
    mine = [session for session in pool().leased.values() if session not in before]
    others = _still_used_after_a_while([session for session in in_use() if session not in {*mine, *before}])
    left = [*mine, *others]
    counts = sum([*surplus.values(), *[session.counts for session in left]], Counter())
    if not left and not counts:
        return None
    for session, taken in surplus.items():
        for key, shared in taken.elements():
            session.give_back([key], shared=shared)
    close_leftovers(left_by, before)
    for session in others:
        session.cut_off(f"{left_by} has ended")
    locks.forget_what_was_left()
    lock_sequences.forget_what_was_left()
    _wait_for_the_server(left)
    return _left_behind(left_by, counts)


def _left_behind(left_by: str, counts: Counts) -> LocksLeftBehind:
    if not counts:
        return LocksLeftBehind(f"{left_by} left a thread behind that waited for a lock, and is cut off now")
    held = names(dict.fromkeys(key for key, _ in counts))
    return LocksLeftBehind(f"{left_by} left locks behind, which are free again now: {held}")


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
