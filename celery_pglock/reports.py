"""What a look at all locks of a database finds that somebody should know of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias, TypeVar

from django.db import connections, router
from django.db.models import BooleanField, ExpressionWrapper, Q, Sum
from django.db.models.functions import Now

from celery_pglock import config, inquiries, wordings
from celery_pglock.durations import Duration, seconds
from celery_pglock.labels import LONGEST_NAME
from celery_pglock.looks import FAILURES, looking
from celery_pglock.model_locks import model
from celery_pglock.models import PGLock, SkipCount
from celery_pglock.modes import ACCESS_SHARE
from celery_pglock.printed_texts import in_json, one_line
from celery_pglock.querysets import IS_MARKER, OwnPid
from celery_pglock.side_effects import Raise
from celery_pglock.trees import Backend, Cycle
from celery_pglock.wordings import UNREADABLE

HELD: Final = "held_too_long"
WAITING: Final = "waiting_too_long"
CHAIN: Final = "blocked_chain"
CYCLE: Final = "hidden_cycle"
NO_TASK: Final = "no_running_task"
SKIPPED: Final = "skipped_often"

# More than anybody would read; the count of all of them says the rest.
MOST_OF_ONE_KIND = 50

# Counts are by the hour, so the window is between one hour and two.
WINDOW = timedelta(hours=2)

HIDDEN = (
    "what {number} backends of other roles say of their locks: this role may not read it, and GRANT "
    "pg_read_all_stats would let it"
)

COLUMNS = (
    "pk",
    "type",
    "mode",
    "granted",
    "since",
    "wait_duration",
    "rel_name",
    "name",
    "task_name",
    "task_id",
    "worker",
    "classid",
    "objid",
    "objsubid",
    "activity_id",
    "activity__application_name",
)

T = TypeVar("T")

Finding: TypeAlias = dict[str, Any]
"""What JSON knows: the ``kind``, a ``text`` for people, and what the text says as values."""

Run: TypeAlias = tuple[str, str]
"""A worker, and the id of a task that it runs."""

NotRunning: TypeAlias = Callable[[frozenset[Run]], tuple[frozenset[Run], Sequence[str]]]
"""Tells which of these runs their workers do not know of, and what could not be learned."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """From where on something is told: in seconds, ``None`` for never, and in skips."""

    held_after: float | None
    waiting_after: float | None
    skipped_after: int


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in the database of the alias ``using``, by its own clock.

    The numbers are of all locks but markers, and those of the task that reports; what could not be read is
    ``None``, and named in ``unread``.
    """

    using: str
    at: datetime
    held: int
    waiting: int
    skipped: int | None
    longest_held: timedelta | None
    longest_wait: timedelta | None
    findings: tuple[Finding, ...]
    unread: tuple[str, ...]

    def totals(self) -> str:
        """The numbers in words."""
        skipped = "not known" if self.skipped is None else self.skipped
        return f"{self.held} held, {self.waiting} waiting, {skipped} skipped lately"

    def in_json(self) -> dict[str, Any]:
        return {
            **{name: in_json(value) for name, value in asdict(self).items()},
            "findings": list(self.findings),
            "unread": list(self.unread),
        }


@dataclass(slots=True)
class _Draft:
    findings: list[Finding] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def tell(self, kind: str, found: Sequence[T], words: Callable[[T], Finding], left_out: int = 0) -> None:
        """Tell the worst of one kind, which come first, and how many others there are."""
        self.findings += [{"kind": kind, **_storable(words(one))} for one in found[:MOST_OF_ONE_KIND]]
        left_out += max(0, len(found) - MOST_OF_ONE_KIND)
        if left_out:
            self.findings.append(
                {"kind": kind, "text": f"{left_out} more: {kind.replace('_', ' ')}", "left_out": left_out}
            )

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What cannot be read in the block is told, and the rest is told nonetheless."""
        try:
            yield
        except FAILURES as error:
            self.unread.append(not_done(what, error))


def thresholds(held_after: Duration, waiting_after: Duration, skipped_after: int | None) -> Thresholds:
    """These, or those of the settings where they are ``None``."""
    settings = config.current()
    if skipped_after is not None:
        config.check_count(skipped_after, "report_locks(skipped_after=...)")
    return Thresholds(
        seconds(settings.HELD_AFTER if held_after is None else held_after, "report_locks(held_after=...)"),
        seconds(
            settings.WAITING_AFTER if waiting_after is None else waiting_after,
            "report_locks(waiting_after=...)",
        ),
        settings.SKIPPED_AFTER if skipped_after is None else skipped_after,
    )


def report(alias: str, limits: Thresholds, not_running: NotRunning, *, task_id: str = "") -> Report:
    """Look at the locks of this alias; those of the task ``task_id``, which reports, are left out.

    Waits for nothing. Raises Django's errors where the locks themselves cannot be read.
    """
    draft = _Draft()
    with looking(alias):
        at = _clock(alias)
        rows = [row for row in _rows(alias) if not task_id or row.task_id != task_id]
    held = [row for row in rows if row.granted]
    # A holder's own clock may be ahead of the server's.
    ages = {row.pk: max(at - row.since, timedelta()) for row in held if row.since is not None}
    waits = {row.pk: row.wait_duration or timedelta() for row in rows if not row.granted}
    if hidden := {row.activity_id for row in rows if row.is_hidden}:
        draft.unread.append(HIDDEN.format(number=len(hidden)))
    _tell_locks(draft, HELD, held, ages, limits.held_after)
    _tell_locks(draft, WAITING, [row for row in rows if not row.granted], waits, limits.waiting_after)
    with draft.going_on("who waits for whom"):
        _tell_chains(draft, alias, {row.activity_id: row.worker for row in rows if row.worker}, limits)
    with draft.going_on("the locks of tasks that do not run"):
        _tell_without_task(draft, alias, held, ages, not_running)
    skipped = None
    with draft.going_on("the counts of skips"):
        skipped = _tell_skips(draft, limits.skipped_after)
    return Report(
        using=alias,
        at=at,
        held=len(held),
        waiting=len(waits),
        skipped=skipped,
        longest_held=max(ages.values(), default=None),
        longest_wait=max(waits.values(), default=None),
        findings=tuple(draft.findings),
        unread=tuple(draft.unread),
    )


def _storable(finding: Finding) -> Finding:
    # jsonb keeps no NUL, which a key's text may have.
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
        for name, value in finding.items()
    }


def not_done(what: str, error: Exception) -> str:
    """What was not done, and why, in a line."""
    return one_line(f"{what}: {str(error).strip() or type(error).__name__}")


def _clock(alias: str) -> datetime:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        now: datetime = cursor.fetchone()[0]
    return now


def _rows(alias: str) -> Iterable[Any]:
    wanted = Q(granted=False) | Q(type="ADVISORY")
    found = PGLock.objects.using(alias).filter(wanted).exclude(IS_MARKER).exclude(activity_id=OwnPid())
    hidden = ExpressionWrapper(Q(activity__query=UNREADABLE), output_field=BooleanField())
    return found.annotate(is_hidden=hidden).values_list(*COLUMNS, "is_hidden", named=True)


def _tell_locks(
    draft: _Draft, kind: str, rows: Iterable[Any], ages: dict[str, timedelta], limit: float | None
) -> None:
    if limit is None:
        return
    found = [row for row in rows if row.pk in ages and ages[row.pk].total_seconds() >= limit]
    found.sort(key=lambda row: ages[row.pk], reverse=True)
    verb = "has held" if kind == HELD else "has waited for"
    draft.tell(kind, found, lambda row: _of_lock(row, ages[row.pk], f"{verb} {wordings.lock(row)}"))


def _of_lock(row: Any, age: timedelta, words: str) -> Finding:
    return {
        "text": f"{_who(row)} {words} for {one_line(age)}",
        "pid": row.activity_id,
        "task_name": row.task_name,
        "task_id": row.task_id,
        "worker": row.worker,
        "lock": wordings.lock(row),
        "name": row.name,
        "mode": row.mode,
        "seconds": age.total_seconds(),
    }


def _who(row: Any) -> str:
    if row.task_name or row.task_id:
        words = f"{row.task_name or 'task'} [{row.task_id}]{f' on {row.worker}' if row.worker else ''}"
    else:
        words = row.activity__application_name or "a session that is no task"
    return f"{one_line(words)} (backend {row.activity_id})"


def _tell_chains(draft: _Draft, alias: str, workers: dict[Any, str], limits: Thresholds) -> None:
    waits = inquiries.waits(alias)
    hidden = [cycle for cycle in waits.cycles if not cycle.is_visible]
    draft.tell(CYCLE, hidden, _of_cycle)
    if limits.waiting_after is None:
        return
    behind = {root: waits.behind(root) for root in waits.roots()}
    roots = [root for root, (_, longest) in behind.items() if longest.total_seconds() >= limits.waiting_after]
    roots.sort(key=lambda root: behind[root][1], reverse=True)
    shown = [tree.backend for tree in waits.trees(roots[:MOST_OF_ONE_KIND])]
    draft.tell(CHAIN, shown, lambda root: _of_root(root, *behind[root.pid], workers), len(roots) - len(shown))


def _of_cycle(cycle: Cycle) -> Finding:
    longest = max(wait.wait_duration or timedelta() for wait in cycle.waits)
    return {
        "text": str(cycle),
        "pids": [wait.activity_id for wait in cycle.waits],
        "locks": [wordings.lock(wait) for wait in cycle.waits],
        "seconds": longest.total_seconds(),
    }


def _of_root(backend: Backend, number: int, longest: timedelta, workers: dict[Any, str]) -> Finding:
    others = "1 other" if number == 1 else f"{number} others"
    return {
        "text": f"{backend} holds up {others}, one of them for {one_line(longest)}",
        "pid": backend.pid,
        "task_name": backend.task_name,
        "task_id": backend.task_id,
        "worker": workers.get(backend.pid, ""),
        "behind": number,
        "seconds": longest.total_seconds(),
    }


def _tell_without_task(
    draft: _Draft, alias: str, held: Iterable[Any], ages: dict[str, timedelta], not_running: NotRunning
) -> None:
    runs: dict[Run, list[Any]] = {}
    for row in held:
        if _is_of_worker(row):
            runs.setdefault((row.worker, row.task_id), []).append(row)
    if not runs:
        return
    unknown, unread = not_running(frozenset(runs))
    draft.unread += unread
    suspects = [row for run, rows in runs.items() if run in unknown for row in rows]
    if not suspects:
        return
    # It may have ended in order since the first look, or its session works for another task by now.
    with looking(alias):
        again = PGLock.objects.using(alias).filter(pk__in=[row.pk for row in suspects])
        still = set(again.values_list("pk", "since", "task_id"))
    found = [row for row in suspects if (row.pk, row.since, row.task_id) in still]
    found.sort(key=lambda row: ages[row.pk], reverse=True)
    words = "does not run on its worker, and has held"
    draft.tell(NO_TASK, found, lambda row: _of_lock(row, ages[row.pk], f"{words} {wordings.lock(row)}"))


def _is_of_worker(row: Any) -> bool:
    # Workers are called name@host, and eager tasks after their host. What a label has cut no worker knows.
    is_whole = max(len(text.encode()) for text in (row.worker, row.task_id)) < LONGEST_NAME
    return bool("@" in row.worker and row.task_id and row.since is not None and is_whole)


def _tell_skips(draft: _Draft, limit: int) -> int:
    alias = router.db_for_write(SkipCount)
    with looking(alias):
        model(SkipCount, mode=ACCESS_SHARE, timeout=0, using=alias, side_effect=Raise())
        lately = SkipCount.objects.using(alias).filter(hour__gt=Now() - WINDOW)
        total: int = lately.aggregate(total=Sum("count", default=0))["total"]
        often = lately.values("key", "task_name").annotate(skips=Sum("count")).filter(skips__gte=limit)
        shown = list(often.order_by("-skips", "key", "task_name")[:MOST_OF_ONE_KIND])
        left_out = often.count() - len(shown) if len(shown) == MOST_OF_ONE_KIND else 0
    draft.tell(SKIPPED, shown, _of_key, left_out)
    return int(total)


def _of_key(row: Any) -> Finding:
    name, text, skips = row["task_name"], row["key"], int(row["skips"])
    words = f"{name} was skipped {skips} times in this hour and the last because of {text!r}"
    return {"text": one_line(words), "task_name": name, "name": text, "skips": skips}
