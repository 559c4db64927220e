"""Who is in the way of critical tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from django.db.models import BooleanField, ExpressionWrapper, Q

from celery_pglock import backends, config, labels, wordings
from celery_pglock.backends import EXPLANATIONS, NOT_PERMITTED
from celery_pglock.consequences import CLIENT, RUNS
from celery_pglock.errors import LockMisuse
from celery_pglock.filters import filtered
from celery_pglock.looks import looking
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock
from celery_pglock.pool import pool
from celery_pglock.printed_texts import one_line
from celery_pglock.querysets import IS_MARKER, OwnPid
from celery_pglock.waiters import blocked

AS_CRITICAL = "it is as critical"

TaskOrPid: TypeAlias = str | int
"""A task by its id, and a backend that works for none by its pid."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """A session of a critical task, and what it has waited for, for so many seconds."""

    pid: int
    task_name: str
    task_id: str
    priority: int
    lock: str
    waited: float

    def __str__(self) -> str:
        return f"{_who(self.task_name, self.task_id, self.pid)}, which waits for {self.lock}"


@dataclass(frozen=True, slots=True)
class Session:
    """A backend as it was read: who has its pid by now, whoever stops it finds out."""

    pid: int
    backend_start: datetime | None
    application_name: str | None
    is_active: bool


@dataclass(frozen=True, slots=True)
class Blocker:
    """A task, or a backend that works for none, in the way of a critical task.

    ``rows`` are the waits for which it was chosen, ``sessions`` all that the task has.
    """

    who: str
    task_name: str
    task_id: str
    sessions: tuple[Session, ...]
    rows: tuple[str, ...]
    waiter: Waiter

    def __str__(self) -> str:
        return self.who

    @property
    def reason(self) -> str:
        return f"in the way of {self.waiter}"

    def in_json(self) -> dict[str, Any]:
        return {
            "who": self.who,
            "task_name": self.task_name,
            "task_id": self.task_id,
            "pids": [session.pid for session in self.sessions],
            "in_the_way_of": str(self.waiter),
        }


@dataclass(frozen=True, slots=True)
class Spared:
    """Somebody in the way who is not stopped."""

    who: str
    pid: int | None
    reason: str
    waiter: Waiter

    def __str__(self) -> str:
        return f"{self.waiter} is blocked by {self.who}, who is spared: {self.reason}"

    def in_json(self) -> dict[str, Any]:
        return {"who": self.who, "pid": self.pid, "reason": self.reason, "in_the_way_of": str(self.waiter)}


@dataclass(frozen=True, slots=True)
class Situation:
    """Who waits, and who is in the way: first to be stopped first."""

    waiters: tuple[Waiter, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    spared: tuple[Spared, ...] = ()


def check_victims() -> None:
    """Refuse a setting ``VICTIMS`` whose filters cannot be used; asks no database."""
    _filtered(PGActivity.objects.all())


def look(alias: str, min_wait: float) -> Situation:
    """Who has waited for that long, and who is in the way."""
    with looking(alias):
        if not blocked(alias):
            return Situation()
        critical = _markers(alias)
        pids = {pid for pid, _ in critical}
        rows = _waits(alias, pids, timedelta(seconds=min_wait)) if pids else []
        if not rows:
            return Situation()
        # Read once more: whoever is in the way has told by now whether he is critical himself.
        tasks = _Tasks(alias, critical | _markers(alias))
        ahead = _those_who_only_wait(alias, rows)
        in_the_way = {row.blocking_activity_id for row in rows} - {None}
        allowed = _allowed(alias, in_the_way)
        permitted = backends.permitted(in_the_way, alias)
    waiters = {row.pk: tasks.waiter(row) for row in rows}
    rows.sort(key=lambda row: (row.pk in ahead, -waiters[row.pk].priority, -waiters[row.pk].waited, row.pk))
    rows_of: dict[TaskOrPid, list[Any]] = {}
    spared: dict[TaskOrPid, Spared] = {}
    for row in rows:
        who = _task_or_pid(row.blocking_activity_id, row.blocking_activity)
        waiter = waiters[row.pk]
        pid = row.blocking_activity_id
        reason = tasks.why_spared(row, waiter, is_allowed=pid in allowed, is_permitted=pid in permitted)
        if reason:
            spared.setdefault(who, tasks.spared(row, waiter, reason))
        else:
            rows_of.setdefault(who, []).append(row)
    return Situation(
        tuple({(one.pid, one.lock): one for one in waiters.values()}.values()),
        tuple(tasks.blocker(chosen, waiters[chosen[0].pk]) for chosen in rows_of.values()),
        tuple(one for who, one in spared.items() if who not in rows_of),
    )


def rows_left(chosen: Sequence[Blocker], alias: str) -> set[str]:
    """Which of the waits for which these were chosen are there still."""
    rows = [row for blocker in chosen for row in blocker.rows]
    with looking(alias):
        return set(BlockedPGLock.objects.using(alias).filter(pk__in=rows).values_list("pk", flat=True))


def sessions_now(blocker: Blocker, alias: str) -> Sequence[Session]:
    """The sessions of a task as they are now: it may have opened others, or closed some."""
    if not blocker.task_id:
        return blocker.sessions
    with looking(alias):
        return _sessions_of(alias, blocker.task_id)


def _sessions_of(alias: str, task_id: str) -> tuple[Session, ...]:
    found = PGActivity.objects.using(alias).filter(application_name__in=_names_of(task_id))
    return _ordered(found, task_id)


def _names_of(task_id: str) -> list[str]:
    """What sessions of a task are called, work connections first."""
    kinds = (labels.WORK_CONNECTION, labels.LOCK_SESSION)
    return [labels.application_name(kind, task_id) for kind in kinds]


def _ordered(activities: Iterable[Any], task_id: str) -> tuple[Session, ...]:
    names = _names_of(task_id)
    # Workers of a parallel query have the name of the backend that they help, and end with its query.
    sessions = [_session(one) for one in activities if one.backend_type == CLIENT]
    return tuple(sorted(sessions, key=lambda one: (names.index(one.application_name or ""), one.pid)))


def _session(activity: Any) -> Session:
    is_active = activity.state in RUNS
    return Session(activity.pk, activity.backend_start, activity.application_name, is_active)


class _Tasks:
    """Which sessions work for which tasks, and how critical those are, as it was read once."""

    def __init__(self, alias: str, critical: Iterable[tuple[int, int]]) -> None:
        ours = Q(application_name__startswith=f"{labels.LOCK_SESSION}:")
        ours |= Q(application_name__startswith=f"{labels.WORK_CONNECTION}:")
        activities = {one.pk: one for one in PGActivity.objects.using(alias).filter(ours)}
        labelled = PGLock.objects.using(alias).filter(type="ADVISORY").exclude(task_name="")
        names = dict(labelled.values_list("activity_id", "task_name"))
        self._activities: dict[TaskOrPid, list[Any]] = {}
        self._names: dict[TaskOrPid, str] = {}
        self._priorities: dict[TaskOrPid, int] = {}
        for pid, activity in activities.items():
            self._activities.setdefault(_task_or_pid(pid, activity), []).append(activity)
            if pid in names:
                self._names[_task_or_pid(pid, activity)] = names[pid]
        for pid, priority in critical:
            who = _task_or_pid(pid, activities.get(pid))
            self._priorities[who] = max(priority, self._priorities.get(who, 0))
        self._leased = {session.backend_pid for session in pool().leased.values()}

    def waiter(self, row: Any) -> Waiter:
        who = _task_or_pid(row.activity_id, row.activity)
        return Waiter(
            row.activity_id,
            self._names.get(who, ""),
            who if isinstance(who, str) else "",
            self._priorities.get(who, 0),
            wordings.lock(row),
            row.wait_duration.total_seconds(),
        )

    def why_spared(self, row: Any, waiter: Waiter, *, is_allowed: bool, is_permitted: bool) -> str:
        """Why the one in the way is not to be stopped; empty if he may be."""
        pid, activity = row.blocking_activity_id, row.blocking_activity
        priority = self._priorities.get(_task_or_pid(pid, activity), 0)
        if pid is None:
            return "it has no backend"
        if row.is_own or pid in self._leased:
            return "it is a session of whoever clears the way"
        if activity is None:
            return "it is not of this database, or has ended"
        if priority >= waiter.priority:
            return f"{AS_CRITICAL}: its priority is {priority}"
        if activity.backend_start is None:
            return EXPLANATIONS[NOT_PERMITTED]
        if activity.backend_type != CLIENT:
            return f"it is PostgreSQL's own: {activity.backend_type}"
        if not is_allowed:
            name = one_line(activity.application_name or "")
            return f"no filter of CELERY_PGLOCK['VICTIMS'] finds it: application_name={name}"
        return "" if is_permitted else EXPLANATIONS[NOT_PERMITTED]

    def spared(self, row: Any, waiter: Waiter, reason: str) -> Spared:
        return Spared(self._words(row), row.blocking_activity_id, reason, waiter)

    def blocker(self, rows: Sequence[Any], waiter: Waiter) -> Blocker:
        who = _task_or_pid(rows[0].blocking_activity_id, rows[0].blocking_activity)
        task_id = who if isinstance(who, str) else ""
        activities = {row.blocking_activity_id: row.blocking_activity for row in rows}
        if task_id:
            activities |= {one.pk: one for one in self._activities.get(who, ())}
            sessions = _ordered(activities.values(), task_id)
        else:
            sessions = tuple(map(_session, activities.values()))
        pks = tuple(row.pk for row in rows)
        return Blocker(self._words(rows[0]), self._names.get(who, ""), task_id, sessions, pks, waiter)

    def _words(self, row: Any) -> str:
        pid, activity = row.blocking_activity_id, row.blocking_activity
        who = _task_or_pid(pid, activity)
        if isinstance(who, str):
            return _who(self._names.get(who, ""), who, 0)
        return wordings.PREPARED if pid is None else f"backend {pid}: {wordings.backend(activity)}"


def _task_or_pid(pid: int | None, activity: Any) -> TaskOrPid:
    task_id = labels.task_id_of((activity and activity.application_name) or "")
    return task_id or pid or 0


def _markers(alias: str) -> set[tuple[Any, Any]]:
    """The backends that run critical tasks, with their priorities."""
    found = PGLock.objects.using(alias).filter(IS_MARKER, granted=True, activity_id__isnull=False)
    return set(found.values_list("activity_id", "objid"))


def _waits(alias: str, pids: Iterable[int], least: timedelta) -> list[Any]:
    found = BlockedPGLock.objects.using(alias).filter(activity_id__in=list(pids))
    is_own = ExpressionWrapper(Q(blocking_activity_id=OwnPid()), output_field=BooleanField())
    rows = found.annotate(is_own=is_own).select_related("activity", "blocking_activity")
    return [row for row in rows if row.wait_duration is not None and row.wait_duration >= least]


def _those_who_only_wait(alias: str, rows: Iterable[Any]) -> set[str]:
    """Of these waits those behind somebody who waits for the same lock, and has nothing of it yet."""
    behind: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        behind.setdefault((row.blocking_activity_id, _subject(row)), []).append(row.pk)
    locks = PGLock.objects.using(alias)
    waiting = locks.filter(granted=False, activity_id__in={pid for pid, _ in behind} - {None})
    found = {(row.activity_id, _subject(row)) for row in waiting} & behind.keys()
    if found:
        of_them = Q()
        for pid, subject in found:
            of_them |= Q(activity_id=pid, pk__startswith=f"{subject}:")
        found -= {(row.activity_id, _subject(row)) for row in locks.filter(of_them, granted=True)}
    return {pk for one in found for pk in behind[one]}


def _subject(row: Any) -> str:
    """What a row's lock is on: the beginning of its id, before its backend."""
    return str(row.pk).rpartition(f":{row.activity_id}:")[0]


def _allowed(alias: str, pids: Iterable[int]) -> set[int]:
    """Of those in the way the ones that the settings name."""
    found = PGActivity.objects.using(alias).filter(pk__in=pids)
    return {pid for one in _filtered(found) for pid in one.values_list("pk", flat=True)}


def _filtered(activities: Any) -> list[Any]:
    texts = config.current().VICTIMS
    try:
        return [activities] if texts is None else [filtered(activities, [text]) for text in texts]
    except LockMisuse as misuse:
        raise LockMisuse(f"CELERY_PGLOCK['VICTIMS']: {misuse}") from misuse


def _who(task_name: str, task_id: str, pid: int) -> str:
    return one_line(f"{task_name or 'task'} [{task_id}]" if task_id else f"backend {pid}")
