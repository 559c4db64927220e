"""The way cleared for code that must get through."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from django.apps import apps
from django.core.exceptions import FieldError
from django.db import OperationalError, connections

from celery_pglock import undisturbed
from celery_pglock.audits import acting
from celery_pglock.backends import GONE, Stop
from celery_pglock.blocks import Block
from celery_pglock.config import check_alias, current
from celery_pglock.durations import UNSET, Duration, MaybeDuration, MaybeSeconds, seconds
from celery_pglock.errors import LockMisuse
from celery_pglock.looks import leave_the_pool, looking, no_views
from celery_pglock.pool import pool
from celery_pglock.raw_connections import check_vendor
from celery_pglock.timeouts import timeout as lock_timeout

logger = logging.getLogger(__name__)

# How long leaving the block waits for a look that is under way, in seconds: its statements end before that.
LAST_LOOK = 15.0

# PostgreSQL's own work, which would begin anew; and copies of the database, which others depend on.
# Since PostgreSQL 17 workers of logical replication have types of their own.
NEVER_STOPPED = (
    "AUTOVACUUM_WORKER",
    "BACKGROUND_WORKER",
    "WALSENDER",
    "LOGICAL_REPLICATION_WORKER",
    "LOGICAL_REPLICATION_APPLY_WORKER",
    "LOGICAL_REPLICATION_TABLESYNC_WORKER",
    "LOGICAL_REPLICATION_PARALLEL_WORKER",
)

WHO_AM_I = "SELECT pg_backend_pid(), to_regclass('celery_pglock_blockedpglock') IS NOT NULL"


@dataclass(frozen=True, init=False)
class PrioritizeSideEffect(ABC):
    """What is done to those who are in the way; subclass it and write ``worker``.

    The keywords are filters on ``BlockedPGLock``: ``Terminate(wait_duration__gte="5 seconds")`` or
    ``Cancel(blocking_activity__application_name="reports")``.
    """

    filters: Mapping[str, Any]

    def __init__(self, **filters: Any) -> None:
        object.__setattr__(self, "filters", filters)

    @abstractmethod
    def worker(self, blocked_locks: Any) -> Any:
        """Do it to a ``BlockedPGLock`` queryset; called in a thread of its own, with timeouts in force."""


class Terminate(PrioritizeSideEffect):
    """End the sessions of those who are in the way."""

    def worker(self, blocked_locks: Any) -> tuple[Stop, ...]:
        stops: tuple[Stop, ...] = blocked_locks.terminate_blocking_activity()
        return stops


class Cancel(PrioritizeSideEffect):
    """Cancel the statements of those who are in the way; one that is idle in a transaction stays there."""

    def worker(self, blocked_locks: Any) -> tuple[Stop, ...]:
        stops: tuple[Stop, ...] = blocked_locks.cancel_blocking_activity()
        return stops


@dataclass(frozen=True, init=False)
class prioritize(Block[None]):  # noqa: N801 - django-pglock's name, used like a function
    """Stop whoever blocks the code in the block: ``with prioritize():``, or ``@prioritize()``.

    interval:
        Seconds (a number or a timedelta) between two looks, and before the first.
    periodic:
        ``False`` looks once.
    using:
        Alias in ``DATABASES``. The code's Django connection and its lock session there are both looked after.
    timeout:
        ``lock_timeout`` for the code, as ``timeout()`` sets it; longer than ``interval`` to be of use.
    side_effect:
        ``Terminate`` (the default), ``Cancel``, or one of your own; an instance may have filters.

    Never stopped are the code's own sessions, maintenance such as autovacuum, and replication. A look that
    fails for a while is logged; an error that ends the looking is logged at once, and raised when the block
    is left well. Needs ``"celery_pglock"`` in INSTALLED_APPS, migrated.
    """

    interval: float
    periodic: bool
    using: str
    timeout: MaybeSeconds
    side_effect: PrioritizeSideEffect

    def __init__(
        self,
        *,
        interval: Duration = 1,
        periodic: bool = True,
        using: str = "default",
        timeout: MaybeDuration = UNSET,
        side_effect: PrioritizeSideEffect | type[PrioritizeSideEffect] = Terminate,
    ) -> None:
        effect = side_effect() if isinstance(side_effect, type) else side_effect
        if not isinstance(effect, PrioritizeSideEffect):
            raise LockMisuse(
                f"prioritize(side_effect=...) takes Terminate, Cancel or your own, not {effect!r}."
            )
        between = seconds(interval, "prioritize(interval=...)")
        if not between:
            raise LockMisuse(f"prioritize(interval=...) must be more than 0 seconds, not {interval!r}.")
        fields = {
            "interval": between,
            "periodic": periodic,
            "using": using,
            "timeout": timeout if timeout is UNSET else seconds(timeout, "prioritize(timeout=...)"),
            "side_effect": effect,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        lookout = _Lookout(self)
        bounded = nullcontext() if self.timeout is UNSET else lock_timeout(self.timeout, using=self.using)
        try:
            lookout.begin()
            with bounded:
                yield
        finally:
            lookout.end()
        if lookout.error is not None:
            raise lookout.error


class _Lookout:
    """The thread that looks after one use of ``prioritize``, and whom it looks after."""

    def __init__(self, order: prioritize) -> None:
        check_alias(order.using, "prioritize(using=...)")
        check_vendor(order.using)
        self.error: BaseException | None = None
        self._order = order
        self._blocked_locks = _blocked_locks(order)
        self._connection = connections[order.using]
        # The sessions that this thread leases, now and later.
        self._leased = pool().leased
        self._is_over = threading.Event()
        self._told: set[Stop] = set()
        self._thread = threading.Thread(
            target=self._look_again_and_again, name="pglock-prioritize", daemon=True
        )

    def begin(self) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(WHO_AM_I)
            self._pid, has_views = cursor.fetchone()
        if not has_views:
            raise no_views(self._order.using)
        self._session = self._connection.connection
        self._is_pooled = self._session.info.backend_pid != self._pid
        if self._is_pooled and current().POOLER != "session":
            raise LockMisuse(
                f"Between the database alias {self._order.using!r} and its server is a connection pooler: "
                f"whose way is to be cleared cannot be told. Use an alias that connects to the server "
                f"directly, or, if the pooler runs in session mode, say so by "
                f"CELERY_PGLOCK['POOLER'] = 'session'."
            )
        undisturbed.start(self._thread)

    def end(self) -> None:
        self._is_over.set()
        if self._thread.ident is None:
            return
        self._thread.join(LAST_LOOK)
        if self._thread.is_alive():
            logger.warning(
                "The last look of prioritize() is still under way; it is not waited for any longer."
            )

    def _look_again_and_again(self) -> None:
        try:
            leave_the_pool(connections[self._order.using])
            while not self._is_over.wait(self._order.interval):
                self._look()
                if not self._order.periodic:
                    break
        except BaseException as error:
            self.error = error
            logger.exception("prioritize() clears the way no longer")
        finally:
            connections[self._order.using].close()

    def _look(self) -> None:
        pids = self._pids()
        in_the_way = self._blocked_locks.filter(activity_id__in=pids).exclude(blocking_activity_id__in=pids)
        try:
            with looking(self._order.using):
                if in_the_way.exists() and not self._is_over.is_set():
                    with acting("prioritize"):
                        self._tell(self._order.side_effect.worker(in_the_way))
        except OperationalError as error:
            logger.warning("prioritize() could not look this time: %s", str(error).strip())

    def _pids(self) -> list[int]:
        """The backends of the code as it is now: it may have closed a connection, and opened another."""
        pids = []
        session = self._connection.connection
        if session is not None and not session.closed:
            if not self._is_pooled:
                pids.append(session.info.backend_pid)
            elif session is self._session:
                pids.append(self._pid)
        lock_session = self._leased.get(self._order.using)
        if lock_session is not None and not lock_session.is_closed:
            pids.append(lock_session.backend_pid)
        return pids

    def _tell(self, results: Any) -> None:
        for stop in results if isinstance(results, tuple | list) else ():
            if not isinstance(stop, Stop):
                continue
            if stop.is_done:
                logger.info("prioritize() cleared the way: %s", stop)
            elif stop.outcome != GONE and stop not in self._told:
                self._told.add(stop)
                logger.error("prioritize() is blocked by %s", stop)


def _blocked_locks(order: prioritize) -> Any:
    """Who may be stopped, of all who block anybody."""
    try:
        model = apps.get_model("celery_pglock", "BlockedPGLock")
    except LookupError as error:
        raise LockMisuse("prioritize() needs 'celery_pglock' in INSTALLED_APPS, migrated.") from error
    try:
        chosen = model.objects.using(order.using).filter(**order.side_effect.filters)
    except (FieldError, ValueError, TypeError) as error:
        raise LockMisuse(f"The filters of {order.side_effect!r} cannot be used: {error}") from error
    return chosen.exclude(blocking_activity__backend_type__in=NEVER_STOPPED)
