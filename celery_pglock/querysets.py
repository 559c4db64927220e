"""Questions about locks and backends, and ways to stop those that were found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from django.db.models import BigIntegerField, Func, IntegerField, Model, Q, QuerySet, TextField, Value
from django.db.models.functions import Cast

from celery_pglock import backends, config, markers, waiters
from celery_pglock.backends import Stop, Victim
from celery_pglock.errors import LockMisuse
from celery_pglock.filters import filtered
from celery_pglock.looks import looking
from celery_pglock.tables import AnyModel, quoted, tables_of
from celery_pglock.waiters import Pid

# PostgreSQL's pids are int4.
ENDLESS_PID = 2**31
MOST_DIGITS = 10

# Locks by which critical tasks mark their backends: nobody ever waits for one.
IS_MARKER = Q(type="ADVISORY", **markers.columns())

M = TypeVar("M", bound=Model)
Self = TypeVar("Self", bound="ViewQuerySet[Any]")


class RelationOf(Func):
    """The oid of a table by its quoted name; NULL if there is none."""

    function = "to_regclass"
    template = "%(function)s(%(expressions)s)::oid"
    output_field = BigIntegerField()


class OwnPid(Func):
    """The backend that is asked."""

    function = "pg_backend_pid"
    output_field = IntegerField()


class ViewQuerySet(QuerySet[M]):
    """Rows of one of our views, of which some column names a backend."""

    pid_field = "activity_id"

    def pid(self: Self, *pids: int) -> Self:
        """Only those of backends with these pids."""
        if not pids:
            raise LockMisuse("pid() needs at least one pid: without any it would choose every backend.")
        return self.filter(**{f"{self.pid_field}__in": [_pid(pid) for pid in pids]})

    def config(self: Self, name: str | None, **overrides: Any) -> Self:
        """What a configuration of ``CELERY_PGLOCK["CONFIGS"]`` chooses by its name.

        It may have ``database``, ``pids``, ``on`` and ``filters``; overrides that are not empty take their
        places.
        """
        chosen = config.chosen(name, overrides)
        found = self.using(chosen.database) if chosen.database else self.all()
        if chosen.pids:
            found = found.pid(*chosen.pids)
        if chosen.on:
            found = found._on(chosen.on)
        result: Self = filtered(found, chosen.filters)
        return result

    def _on(self: Self, models: Iterable[AnyModel]) -> Self:
        raise LockMisuse("Only locks are on models; leave `on` out of what chooses backends.")

    def _victims(self, pid: str) -> tuple[Victim, ...]:
        """Each backend in this column once, with the rows for which it was chosen."""
        backend = "" if pid == "id" else f"{pid.removesuffix('_id')}__"
        columns = (pid, f"{backend}backend_start", f"{backend}application_name")
        rows: dict[tuple[Any, Any, Any], list[Any]] = {}
        for row, number, start, name in self.values_list("pk", *columns):
            if number is not None:
                rows.setdefault((number, start, name), []).append(row)
        return tuple(
            Victim(number, start, name, tuple(chosen)) for (number, start, name), chosen in rows.items()
        )

    def _cancel(self, pid: str) -> tuple[Stop, ...]:
        with looking(self.db):
            victims = self._victims(pid)
        return backends.cancel(victims, self.model._meta.db_table, self.db)

    def _terminate(self, pid: str) -> tuple[Stop, ...]:
        with looking(self.db):
            victims = self._victims(pid)
        return backends.terminate(victims, self.model._meta.db_table, self.db)


class PGActivityQuerySet(ViewQuerySet[M]):
    """Backends of this database."""

    pid_field = "id"

    def cancel(self) -> tuple[Stop, ...]:
        """Cancel the statements of these backends; tells what became of each."""
        return self._cancel("id")

    def terminate(self) -> tuple[Stop, ...]:
        """End the sessions of these backends; tells what became of each."""
        return self._terminate("id")


class PGLockQuerySet(ViewQuerySet[M]):
    """Locks of this database, held and waited for."""

    def on(self: Self, *models: AnyModel) -> Self:
        """Only those on the tables of these models: on the tables themselves, or on rows in them."""
        if not models:
            raise LockMisuse("on() needs at least one model: a class, or a label such as 'auth.User'.")
        return self._on(models)

    def _on(self: Self, models: Iterable[AnyModel]) -> Self:
        names = {quoted(table, self.db) for model in models for table in tables_of(model)}
        on_any = Q()
        for name in sorted(names):
            on_any |= Q(relation=RelationOf(Cast(Value(name), TextField())))
        return self.filter(on_any)

    def cancel_activity(self) -> tuple[Stop, ...]:
        """Cancel the statements of those who hold or want these locks; tells what became of each."""
        return self._cancel("activity_id")

    def terminate_activity(self) -> tuple[Stop, ...]:
        """End the sessions of those who hold or want these locks; tells what became of each."""
        return self._terminate("activity_id")


class BlockedPGLockQuerySet(PGLockQuerySet[M]):
    """Locks that are waited for, once for each backend that is in the way."""

    def pids(self) -> dict[int, tuple[Pid, ...]]:
        """Who is in the way of each backend that waits, but whoever asks: by pids, ``None`` if prepared.

        Reads no locks, so that it costs the same however many there are. ``LockMisuse`` after a filter.
        """
        if self.query.where or self.query.is_sliced:
            raise LockMisuse("pids() tells of all who wait: it cannot come after a filter.")
        with looking(self.db):
            return waiters.blocked(self.db)

    def cancel_blocking_activity(self) -> tuple[Stop, ...]:
        """Cancel the statements of those who are in the way; tells what became of each."""
        return self._cancel("blocking_activity_id")

    def terminate_blocking_activity(self) -> tuple[Stop, ...]:
        """End the sessions of those who are in the way; tells what became of each."""
        return self._terminate("blocking_activity_id")


def _pid(given: Any) -> int:
    text = str(given)
    if isinstance(given, bool) or not _is_number(text) or int(text) >= ENDLESS_PID:
        raise LockMisuse(f"{given!r} is not a pid: use the number of a backend, as pg_stat_activity has it.")
    return int(text)


def _is_number(text: str) -> bool:
    # Python refuses to read numbers of thousands of digits.
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS
