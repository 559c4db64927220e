"""Orders to stop backends, which hit exactly those that were named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery_pglock import backends, consequences, wordings
from celery_pglock.backends import Stop, Victim
from celery_pglock.config import Chosen
from celery_pglock.errors import LockMisuse
from celery_pglock.inquiries import rows
from celery_pglock.looks import looking
from celery_pglock.models import BlockedPGLock, PGLock
from celery_pglock.printed_texts import cut, one_line

LONGEST_QUERY = 80


@dataclass(frozen=True, slots=True)
class Target:
    """A backend that an order would stop, with the rows for which it was chosen."""

    pid: int
    activity: Any
    rows: Sequence[Any]

    def __str__(self) -> str:
        return self.words + (f"; {self.query}" if self.query else "")

    @property
    def words(self) -> str:
        """Who it is and why it was chosen, without its query."""
        words = wordings.backend(self.activity, *self._task)
        application = one_line(self.activity.application_name or "") if self.activity else ""
        if application and application not in words:
            words = words.replace(", ", f" ({application}), ", 1)
        return f"backend {self.pid}: {words}, {self._reason()}"

    @property
    def query(self) -> str:
        """The beginning of its query, on one line."""
        return cut(one_line(self.activity.query), LONGEST_QUERY) if self.activity else ""

    def consequence(self, *, terminates: bool) -> str:
        """What stopping it does to whoever uses it."""
        name, _ = self._task
        return consequences.consequence(self.activity, name, terminates=terminates)

    @property
    def _task(self) -> tuple[str, str]:
        task = next((row for row in self._own_rows() if row.task_name), None)
        return (task.task_name, task.task_id) if task else ("", "")

    def _own_rows(self) -> list[Any]:
        return [row for row in self.rows if row.activity_id == self.pid]

    def _reason(self) -> str:
        first, *more = sorted(self.rows, key=_most_telling)
        if self._own_rows():
            reason = f"{'holds' if first.granted else 'waits for'} {wordings.lock(first)}"
        else:
            reason = f"blocks {first.activity_id}, which waits for {wordings.lock(first)}"
        return reason + (f" and {len(more)} more" if more else "")

    @property
    def victim(self) -> Victim:
        start = self.activity and self.activity.backend_start
        name = self.activity and self.activity.application_name
        return Victim(self.pid, start, name, tuple(row.pk for row in self.rows))


def _most_telling(row: Any) -> tuple[bool, ...]:
    return (row.granted, not row.name, row.type != "ADVISORY", row.rel_kind != "TABLE")


@dataclass(frozen=True, slots=True)
class Order:
    """A choice of backends as it was read once; nothing is done before ``carry_out()``.

    ``prepared`` is how many rows are of transactions that were prepared: they have no backend to stop.
    """

    chosen: Chosen
    targets: tuple[Target, ...]
    prepared: int

    @property
    def goes_beyond_limit(self) -> bool:
        """Whether it is about more rows than a listing would show."""
        number = self.prepared + sum(len(target.rows) for target in self.targets)
        return self.chosen.limit is not None and number > self.chosen.limit

    def carry_out(self) -> tuple[Stop, ...]:
        """Stop each that is still what was read, and say what became of it."""
        model = BlockedPGLock if self.chosen.blocking else PGLock
        act = backends.cancel if self.chosen.cancel else backends.terminate
        victims = [target.victim for target in self.targets]
        return act(victims, model._meta.db_table, str(self.chosen.database))


def order(chosen: Chosen) -> Order:
    """Whom an order would stop: the backends of all rows that were asked for, whatever the limit."""
    if not (chosen.pids or chosen.filters or chosen.on):
        raise LockMisuse(
            "Nothing says whom to stop, which would be every backend of the database: name pids, or narrow "
            "it by --filter or --on."
        )
    victim = "blocking_activity" if chosen.blocking else "activity"
    related = {"activity", victim}
    with looking(str(chosen.database)):
        found = list(rows(chosen).select_related(*related))
    named = targets(found, victim)
    return Order(chosen, named, len(found) - sum(len(target.rows) for target in named))


def targets(found: Iterable[Any], victim: str) -> tuple[Target, ...]:
    """The backends in this column of rows, each once; those of prepared transactions are left out."""
    rows_of: dict[int, list[Any]] = {}
    for row in found:
        if (pid := getattr(row, f"{victim}_id")) is not None:
            rows_of.setdefault(pid, []).append(row)
    return tuple(Target(pid, getattr(chosen[0], victim), chosen) for pid, chosen in rows_of.items())
