"""What an operator can ask of the database in which locks are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from django.db.models import (
    BooleanField,
    Count,
    DurationField,
    ExpressionWrapper,
    F,
    Q,
    Window,
)
from django.db.models.functions import Now

from celery_pglock import config, labels, waiters
from celery_pglock.config import Chosen
from celery_pglock.errors import LockMisuse, did_you_mean
from celery_pglock.holders import Explanation, Holder
from celery_pglock.keys import Identifier
from celery_pglock.listings import Listing
from celery_pglock.locks import advisory
from celery_pglock.looks import looking
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock
from celery_pglock.printed_texts import in_json, one_line
from celery_pglock.querysets import IS_MARKER, OwnPid
from celery_pglock.trees import Cycle, Obstacle, Tree, Wait, Waits
from celery_pglock.waiters import Pid
from celery_pglock.wordings import UNREADABLE

INT = re.compile(r"0|-?[1-9][0-9]*")
PAIR = re.compile(r"\(\s*(0|-?[1-9][0-9]*)\s*,\s*(0|-?[1-9][0-9]*)\s*\)")
# The locks by which transactions can be waited for: each holds those on itself, and mostly nobody waits.
NOT_WAITED_FOR = IS_MARKER | Q(granted=True, type__in=("VIRTUALXID", "TRANSACTIONID"))

WAITS = """
SELECT *, array_remove(blockers, pg_backend_pid()) AS others
FROM celery_pglock_wait
WHERE activity_id <> pg_backend_pid()
"""

# Choices for a person to read.
MOST_TASKS = 100

IN_QUOTES = re.compile(r"""(["'])(.*)\1""", re.DOTALL)

Rows: TypeAlias = Any
"""A queryset of ``PGLock`` or ``BlockedPGLock``."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees of waits; ``left_out`` is how many a limit cut off."""

    trees: tuple[Tree, ...]
    cycles: tuple[str, ...]
    left_out: int
    has_unreadable: bool


@dataclass(frozen=True, slots=True)
class Reasons:
    """Whether a key could be taken now, and what the backends of its holders wait for themselves."""

    explanation: Explanation
    obstacles: Mapping[Pid, tuple[Obstacle, ...]]
    has_unreadable: bool

    def lines(self) -> Iterator[str]:
        """The answer, everybody who is concerned, and the way to the root of what holds them up."""
        found = self.explanation
        yield f"lock {found.lock!r}: {'free to take' if found.would_run else 'taken'}"
        for holder in found.holders:
            yield f"  held by {one_line(holder)}"
            for obstacle in self.obstacles[holder.pid]:
                yield from obstacle.lines(1)
        yield from (f"  waited for by {one_line(waiter)}" for waiter in found.waiters)

    def in_json(self) -> dict[str, Any]:
        found = self.explanation
        holders = [
            _holder_in_json(holder) | {"waits": [one.in_json() for one in self.obstacles[holder.pid]]}
            for holder in found.holders
        ]
        waiters = [_holder_in_json(waiter) for waiter in found.waiters]
        return {"lock": found.lock, "would_run": found.would_run, "holders": holders, "waiters": waiters}


def asked(name: str | None, options: Mapping[str, Any]) -> Chosen:
    """What a configuration and these options ask for, checked; a ``limit`` of ``None`` is none at all."""
    found = config.chosen(name, options)
    alias = found.database or config.current().USING
    config.check_alias(alias, "The option 'database'" if found.database else "CELERY_PGLOCK['USING']")
    return replace(found, database=alias, limit=_limit(found.limit), attributes=_attributes(found))


def rows(chosen: Chosen) -> Rows:
    """The locks that were asked for, or the waits; without those of the backend that looks."""
    found: Rows = BlockedPGLock.objects if chosen.blocking else PGLock.objects
    found = found.config(
        None, database=chosen.database, pids=chosen.pids, on=chosen.on, filters=chosen.filters
    )
    if chosen.blocking:
        found = found.exclude(blocking_activity_id=OwnPid())
    longest_first = [F(name).desc(nulls_last=True) for name in ("wait_duration", "activity__duration")]
    return found.exclude(activity_id=OwnPid()).order_by("granted", *longest_first, "pk")


def all_locks(alias: str) -> Rows:
    """All locks, each with its ``age`` by the database's clock, and with its ``activity``."""
    age = ExpressionWrapper(Now() - F("since"), output_field=DurationField())
    found = PGLock.objects.using(alias).exclude(activity_id=OwnPid())
    return found.annotate(age=age).select_related("activity")


def all_waits(alias: str) -> Rows:
    """All waits, each with both of its activities."""
    found = BlockedPGLock.objects.using(alias).exclude(activity_id=OwnPid())
    return found.exclude(blocking_activity_id=OwnPid()).select_related("activity", "blocking_activity")


def blockers_of(pids: Iterable[int], alias: str) -> dict[int, tuple[Pid, ...]]:
    """Who is in the way of each of these backends, as far as they wait."""
    wanted = set(pids)
    found = waiters.blocked(alias) if wanted else {}
    return {pid: blockers for pid, blockers in found.items() if pid in wanted}


def task_names(alias: str) -> list[str]:
    """The names of the tasks that sessions say they work for, true or not."""
    labelled = PGActivity.objects.using(alias).filter(context__isnull=False)
    contexts: Iterable[Any] = labelled.values_list("context", flat=True)
    names = {str((context or {}).get("task_name") or "") for context in contexts}
    return sorted(names - {""})[:MOST_TASKS]


def listing(chosen: Chosen) -> Listing:
    """The attributes of the locks that were asked for."""
    unreadable = Q(activity__query=UNREADABLE)
    if chosen.blocking:
        unreadable |= Q(blocking_activity__query=UNREADABLE)
    found = (
        rows(chosen)
        .annotate(
            rows_in_all=Window(Count("*")),
            is_unreadable=ExpressionWrapper(unreadable, output_field=BooleanField()),
        )
        .values(*chosen.attributes, "rows_in_all", "is_unreadable")
    )
    if not (chosen.blocking or chosen.pids or chosen.on or chosen.filters):
        found = found.exclude(NOT_WAITED_FOR)
    with looking(str(chosen.database)):
        shown = list(found if chosen.limit is None else found[: chosen.limit])
    return Listing(
        chosen.attributes,
        [[row[attribute] for attribute in chosen.attributes] for row in shown],
        left_out=shown[0]["rows_in_all"] - len(shown) if shown else 0,
        has_unreadable=any(row["is_unreadable"] for row in shown),
    )


def forest(chosen: Chosen) -> Forest:
    """Who waits for whom: the trees with these backends, and with waits that were asked for."""
    alias = str(chosen.database)
    wanted: list[set[int]] = []
    with looking(alias):
        found = _all_waits(alias)
        if chosen.pids:
            wanted.append(set(PGActivity.objects.using(alias).pid(*chosen.pids).values_list("pk", flat=True)))
        if chosen.on or chosen.filters:
            waits_wanted = rows(replace(chosen, blocking=True, pids=()))
            wanted.append(set(waits_wanted.values_list("activity_id", flat=True)))
        waits = _waits(alias, found)
    roots = [root for root in waits.roots() if all(waits.holds_up(root, pids) for pids in wanted)]
    shown = roots if chosen.limit is None else roots[: chosen.limit]
    return Forest(
        tuple(waits.trees(shown)),
        tuple(str(cycle) for cycle in waits.cycles if _concerns(waits, shown, cycle)),
        left_out=len(roots) - len(shown),
        has_unreadable=_are_unreadable(found),
    )


def reasons(identifier: Identifier, alias: str) -> Reasons:
    """Why a key can be taken now, or not: who holds it, and what they wait for themselves."""
    # A transaction-level lock is asked about through poolers, too, and it is the same lock.
    lock = advisory(identifier, xact=True, using=alias)
    with looking(alias):
        explanation = lock.explain()
        found = _all_waits(alias)
        waits = _waits(alias, found)
    return Reasons(
        explanation,
        {holder.pid: waits.obstacles(holder.pid) for holder in explanation.holders},
        has_unreadable=_are_unreadable(found),
    )


def waits(alias: str) -> Waits:
    """Everybody who waits for a lock in the database of this alias."""
    with looking(alias):
        return _waits(alias, _all_waits(alias))


def identifier(text: str) -> Identifier:
    """The lock id that a text stands for: ``42`` and ``(1, 2)`` are numbers, ``"42"`` in quotes is a text."""
    if INT.fullmatch(text):
        return int(text)
    if pair := PAIR.fullmatch(text):
        return int(pair[1]), int(pair[2])
    quoted = IN_QUOTES.fullmatch(text)
    return quoted[2] if quoted else text


def _holder_in_json(holder: Holder) -> dict[str, Any]:
    return {name: in_json(value) for name, value in asdict(holder).items()}


def _all_waits(alias: str) -> list[Wait]:
    if not waiters.blocked(alias):
        return []
    # In a queue of n waiters each is behind all before it: too many rows for one of BlockedPGLock each.
    rows: Iterable[Any] = PGLock.objects.using(alias).raw(WAITS)
    found = [(row, waiters.in_the_way(row.others)) for row in rows]
    pids = {pid for row, blockers in found for pid in (row.activity_id, *blockers)}
    activities = PGActivity.objects.using(alias).in_bulk(pids - {None})
    return [
        Wait(row, row.activity_id, activities.get(row.activity_id), blocker, activities.get(blocker))
        for row, blockers in found
        for blocker in blockers
    ]


def _waits(alias: str, found: Sequence[Wait]) -> Waits:
    if not found:
        return Waits((), {}, {})
    sessions = Q(application_name__startswith=f"{labels.LOCK_SESSION}:")
    sessions |= Q(application_name__startswith=f"{labels.WORK_CONNECTION}:")
    names = PGActivity.objects.using(alias).filter(sessions).values_list("pk", "application_name")
    labelled = PGLock.objects.using(alias).filter(type="ADVISORY").exclude(task_name="")
    tasks = labelled.values_list("activity_id", "task_name", "task_id")
    return Waits(
        found,
        {pid: name or "" for pid, name in names},
        {pid: (name, task_id) for pid, name, task_id in tasks if pid is not None},
    )


def _concerns(waits: Waits, roots: Iterable[Pid], cycle: Cycle) -> bool:
    return any(waits.holds_up(root, [wait.activity_id for wait in cycle.waits]) for root in roots)


def _are_unreadable(found: Iterable[Wait]) -> bool:
    return any(
        activity is not None and activity.query == UNREADABLE
        for wait in found
        for activity in (wait.activity, wait.blocking_activity)
    )


def _limit(given: Any) -> int | None:
    if given is None:
        return None
    text = str(given)
    if isinstance(given, bool) or not (text.isascii() and text.isdigit()):
        raise LockMisuse(f"The limit {given!r} must be a number of rows, or 0 for all of them.")
    return int(text) or None


def _attributes(chosen: Chosen) -> tuple[str, ...]:
    known = _known_attributes(BlockedPGLock if chosen.blocking else PGLock)
    for attribute in chosen.attributes:
        if attribute not in known:
            hint = "; with --blocking there is one" if attribute in _known_attributes(BlockedPGLock) else ""
            raise LockMisuse(
                f"There is no attribute {attribute!r}{hint}.{did_you_mean(str(attribute), known)}"
            )
    return tuple(dict.fromkeys(chosen.attributes))


def _known_attributes(model: Any) -> list[str]:
    known = []
    for field in model._meta.concrete_fields:
        known.append(field.attname)
        if field.related_model:
            known.append(field.name)
            known += [f"{field.name}__{name}" for name in _known_attributes(field.related_model)]
    return known
