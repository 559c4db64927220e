"""Locks on the tables of models, kept by a transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from django.db import DatabaseError, connections, transaction

from celery_pglock.claims import TAKEN
from celery_pglock.config import check_alias, current
from celery_pglock.durations import UNSET, MaybeDuration, MaybeSeconds, seconds
from celery_pglock.errors import LockMisuse
from celery_pglock.modes import ACCESS_EXCLUSIVE, check_mode
from celery_pglock.raw_connections import cancel, check_vendor
from celery_pglock.side_effects import Conflict, Retry, Return, SideEffect, Skip, side_effect
from celery_pglock.tables import AnyModel, quoted, tables_of
from celery_pglock.timeouts import timeout as lock_timeout
from celery_pglock.voices import REFUSALS


def model(
    *models: AnyModel,
    mode: str = ACCESS_EXCLUSIVE,
    using: str = "default",
    timeout: MaybeDuration = UNSET,
    side_effect: SideEffect | type[SideEffect] = Return,
) -> bool:
    """Lock the tables of models until the transaction ends; whether they were obtained, all of them.

    models:
        Classes, instances or labels (``"app.Model"``). A proxy stands for its concrete model, a child of
        multi-table inheritance also for its parents. Several are locked in one canonical order.
    mode:
        One of PostgreSQL's, such as ``SHARE`` or ``ACCESS_EXCLUSIVE``.
    using:
        Alias in ``DATABASES``, on whose Django connection a transaction must be open.
    timeout:
        Seconds (a number or a timedelta) to wait, over all tables together; ``0`` does not wait, ``None``
        waits for ever, unset keeps the ``lock_timeout`` in force, which is for each table.
    side_effect:
        ``Return`` gives False where they were not obtained, ``Raise`` raises ``LockNotAcquired``.

    Where they were not obtained nothing is kept, and the transaction goes on.
    """
    check_mode(mode)
    wait = timeout if timeout is UNSET else seconds(timeout, "timeout")
    effect = _allowed(side_effect)
    check_alias(using, "model(using=...)")
    check_vendor(using)
    tables = sorted({(quoted(table, using), table) for one in models for table in tables_of(one)})
    if not tables:
        raise LockMisuse("model() needs at least one model to lock.")
    if not connections[using].in_atomic_block and connections[using].get_autocommit():
        raise LockMisuse(
            f"A table lock is kept by a transaction, and none is open on alias {using!r}: call model() "
            f"inside of transaction.atomic()."
        )
    if not current().ENABLED:
        return True
    started = time.monotonic()
    reason = _reason_why_not([table for table, _ in tables], mode, using, wait)
    if not reason:
        return True
    names = ", ".join(name for _, name in tables)
    waited = 0.0 if wait == 0 else time.monotonic() - started
    effect.on_conflict(Conflict(key=names, reason=reason, waited=waited, look=tuple))
    return False


def _allowed(given: SideEffect | type[SideEffect]) -> SideEffect:
    effect = side_effect(given, "side_effect")
    if isinstance(effect, Retry | Skip):
        raise LockMisuse(
            f"{type(effect).__name__} cannot be done here: model(side_effect=...) takes Return or Raise."
        )
    return effect


def _reason_why_not(tables: Sequence[str], mode: str, using: str, timeout: MaybeSeconds) -> str | None:
    nowait = " NOWAIT" if timeout == 0 else ""
    ends = time.monotonic() + timeout if isinstance(timeout, float) and timeout else None
    # The time that is left can only be set between statements.
    steps = [[table] for table in tables] if ends is not None else [tables]
    try:
        # A refusal aborts a transaction, and only a savepoint gives partial gains back.
        with transaction.atomic(using):
            for step in steps:
                names = ", ".join(step)
                left = timeout if ends is None else max(0.0, ends - time.monotonic())
                with nullcontext() if left is UNSET or nowait else lock_timeout(left, using=using):
                    _execute(f"LOCK TABLE {names} IN {mode} MODE{nowait}", using)
    except DatabaseError as error:
        reason = REFUSALS.get(type(error.__cause__))
        if reason is None:
            raise
        return TAKEN if nowait else reason
    return None


def _execute(sql: str, using: str) -> None:
    with connections[using].cursor() as cursor:
        try:
            # Without parameters a percent sign in a name is only that.
            cursor.execute(sql)
        except DatabaseError:
            raise
        except BaseException:
            # The lock could be granted later to somebody who gave up.
            if (interrupted := connections[using].connection) is not None:
                cancel(interrupted)
            raise
