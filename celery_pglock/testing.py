"""What tests of locked tasks need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from django.conf import settings
from django.core.exceptions import SynchronousOnlyOperation
from django.db import connections
from django.test import SimpleTestCase, override_settings
from django.test.utils import TestContextDecorator

from celery_pglock import leftovers
from celery_pglock.config import check_alias, current
from celery_pglock.errors import LockMisuse, LockNotAcquired
from celery_pglock.expectations import assert_raised, assert_ran, assert_retried, assert_skipped
from celery_pglock.keys import Identifier, Key
from celery_pglock.labels import Owner
from celery_pglock.leftovers import LocksLeftBehind
from celery_pglock.locks import advisory
from celery_pglock.pool import pool

__all__ = [
    "LocksLeftBehind",
    "assert_raised",
    "assert_ran",
    "assert_retried",
    "assert_skipped",
    "close_lock_sessions",
    "held_elsewhere",
    "lock_free",
    "locks_off",
]


@contextmanager
def held_elsewhere(
    *keys: Identifier | advisory, shared: bool = False, using: str | None = None
) -> Iterator[None]:
    """Hold the keys on a database session of somebody else's, as another worker would.

    Takes ids, or the locks that ``task.lock_for(...)`` gives: of one with a limit every place, on its own
    alias. ``using`` is the alias of ids, ``CELERY_PGLOCK["USING"]`` if it is not named. Raises
    ``LockNotAcquired`` if one is taken already, and in a test that may not use the database what Django or
    pytest-django raise there.
    """
    locks = _locks("held_elsewhere", keys, shared=shared, using=using)
    with ExitStack() as held:
        for alias in dict.fromkeys(lock.using for lock in locks):
            held.enter_context(_held([lock for lock in locks if lock.using == alias], alias, shared=shared))
        yield


def lock_free(*keys: Identifier | advisory, shared: bool = False, using: str | None = None) -> bool:
    """Whether somebody else could take all the keys now; what the caller holds is taken, too.

    Keys and ``using`` are those of ``held_elsewhere``. A lock is judged as its task would take it, shared or
    with its limit; ids as ``shared`` says. It only looks, and takes nothing.
    """
    locks = _locks("lock_free", keys, shared=shared, using=using)
    return all(lock.explain().would_run for lock in locks)


class locks_off(override_settings):  # noqa: N801 - used like a function, as its base is
    """Run tasks and everything else without any lock, as ``CELERY_PGLOCK["ENABLED"] = False`` does.

    ``with locks_off():``, or a decorator of functions and of subclasses of ``unittest.TestCase``. It is for
    the whole process, with all its threads. No lock session is opened; only a task with ``lock_xact`` still
    opens its transaction.
    """

    def __init__(self) -> None:
        super().__init__()

    def enable(self) -> None:
        self.options: dict[str, Any] = _turned_off()
        super().enable()

    def decorate_class(self, cls: Any) -> Any:
        if issubclass(cls, SimpleTestCase):
            return super().decorate_class(cls)
        return TestContextDecorator.decorate_class(self, cls)

    def save_options(self, test_func: Any) -> None:
        # Of a class of Django's, which has it in force in setUpTestData(), too.
        self.options = _turned_off((test_func._overridden_settings or {}).get("CELERY_PGLOCK"))
        super().save_options(test_func)


def close_lock_sessions(left_by: str = "A test") -> None:
    """Close all lock sessions of this process, whichever thread uses them.

    Where one still holds something, ``LocksLeftBehind`` warns of it with the name ``left_by``. A lock of
    another thread may first end by itself, for up to a second; then its owner has lost it.
    """
    if left := leftovers.clear_away(left_by):
        warnings.warn(left, stacklevel=2)


def _turned_off(options: dict[str, Any] | None = None) -> dict[str, Any]:
    options = getattr(settings, "CELERY_PGLOCK", {}) if options is None else options
    return {"CELERY_PGLOCK": {**options, "ENABLED": False}}


@contextmanager
def _held(locks: Sequence[advisory], alias: str, *, shared: bool) -> Iterator[None]:
    places: set[Key] = {slot for lock in locks for key in lock.keys for slot in key.slots(lock.limit)}
    wanted = sorted(places)
    session = pool().new_session(alias, Owner(worker="held_elsewhere"))
    try:
        if not session.take(wanted, shared=shared, timeout=0):
            holders = [str(holder) for lock in locks for holder in lock.holders()]
            raise LockNotAcquired(", ".join(lock.name for lock in locks), holders=holders)
        try:
            yield
        finally:
            session.give_back(wanted, shared=shared)
    finally:
        session.close()


def _locks(
    function: str, keys: Sequence[Identifier | advisory], *, shared: bool, using: str | None
) -> list[advisory]:
    if not keys:
        raise LockMisuse(f"{function}() needs a lock id, or a lock that task.lock_for(...) gives.")
    for one in keys:
        if name := getattr(one, "lock_for", None) and getattr(one, "name", ""):
            raise LockMisuse(f"{function}() takes the lock of a call: {name}.lock_for(...).")
    alias_of_ids = using or current().USING
    check_alias(alias_of_ids, f"{function}(using=...)" if using else "CELERY_PGLOCK['USING']")
    locks = [
        one if isinstance(one, advisory) else advisory(one, shared=shared, using=alias_of_ids) for one in keys
    ]
    for alias in {lock.using for lock in locks}:
        _refuse_what_the_test_may_not_use(alias)
    return locks


def _refuse_what_the_test_may_not_use(alias: str) -> None:
    # A lock session is none of Django's connections, which alone are guarded by Django's test cases and by
    # pytest-django: without asking, it would be one to the real database.
    connection = connections[alias]
    was_open = connection.connection is not None
    with suppress(SynchronousOnlyOperation):
        connection.cursor().close()
        if not was_open:
            connection.close()
