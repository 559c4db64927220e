"""What a test expects of a locked task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from celery import signals as of_celery

from celery_pglock import signals
from celery_pglock.config import current
from celery_pglock.conflicts import TaskConflict
from celery_pglock.errors import LockMisuse, LockNotAcquired
from celery_pglock.locks import advisory

T = TypeVar("T")

RAN = "ran"

# How it is said that this was to happen, and how that it did.
PHRASES = {
    RAN: ("run", "did"),
    "skipped": ("be skipped", "was"),
    "retried": ("be retried", "was"),
    "raised": ("raise LockNotAcquired", "did"),
}

TOLD = {
    "skipped": "it was skipped",
    "retried": "it was retried",
    "raised": "it raised",
    "redelivered": "it was a copy of the message that holds the lock, and comes back",
    "waits": "it waits in place until the broker takes its retry",
}

# Above what a lock that is free takes, in seconds.
A_WHILE = 0.1

COUNTED = {1: "once", 2: "twice"}


class Observation:
    """What becomes of the calls of one task, in all threads of this process, while it is watched."""

    def __init__(self, task: Any) -> None:
        name = task if isinstance(task, str) else getattr(task, "name", None)
        if not isinstance(name, str):
            raise LockMisuse(f"{task!r} is neither a task nor the name of one.")
        self.task_name = name
        self.locks: list[advisory] = []
        self.conflicts: dict[str, list[TaskConflict]] = {outcome: [] for outcome in TOLD}
        self._story: list[str] = []
        # Runs of which no lock has told yet, by task id.
        self._unexplained: dict[str, str] = {}
        self._others: set[str] = set()
        self._is_sent = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        receivers: list[tuple[Any, Callable[..., None]]] = [
            (signals.lock_acquired, self._ran),
            (signals.lock_conflict, self._met_a_conflict),
            (of_celery.task_prerun, self._was_called),
            (of_celery.task_failure, self._failed),
            (of_celery.task_retry, self._was_retried),
            (of_celery.after_task_publish, self._was_sent),
        ]
        for signal, receiver in receivers:
            signal.connect(receiver, weak=False)
        try:
            yield
        finally:
            for signal, receiver in receivers:
                signal.disconnect(receiver)

    def check(self, outcome: str, times: int) -> None:
        """Raise AssertionError unless this happened as often; its text tells what did."""
        __tracebackhide__ = True
        found = len(self.locks if outcome == RAN else self.conflicts[outcome])
        if found == times:
            return
        was_to, did = PHRASES[outcome]
        often = f"{did} {_counted(found)}" if found else f"{did} not"
        raise AssertionError(
            f"{self.task_name} was to {was_to} {_counted(times)}, and {often}: {self._what_happened()}."
        )

    def _what_happened(self) -> str:
        story = [*self._story, *self._unexplained.values()]
        if story:
            return "; ".join(story)
        if self._is_sent:
            return "it was sent to the broker, and no worker of this process has run it"
        others = f"; called were {', '.join(sorted(self._others))}" if self._others else ""
        return f"no worker and no eager call ran it in this process{others}"

    def _is_about(self, task: Any) -> bool:
        return bool(task.name == self.task_name)

    def _ran(self, sender: Any, lock: advisory, waited: float, **_: Any) -> None:
        if self._is_about(sender):
            self._unexplained.pop(sender.request.id, None)
            self.locks.append(lock)
            freed = f"became free after {waited:.2f} s" if waited > A_WHILE else "nobody else held"
            self._story.append(f"it ran under lock {lock.name!r}, which {freed}")

    def _met_a_conflict(self, sender: Any, conflict: TaskConflict, outcome: str, **_: Any) -> None:
        if self._is_about(sender):
            self._unexplained.pop(sender.request.id, None)
            self.conflicts[outcome].append(conflict)
            self._story.append(f"{TOLD[outcome]}: {conflict.error()}")

    def _was_called(self, task: Any, task_id: str, **_: Any) -> None:
        if not self._is_about(task):
            self._others.add(task.name)
        elif current().ENABLED:
            self._unexplained[task_id] = (
                "it ran without a lock, as it states none (is its base class AdvisoryTask? rules and "
                "annotations are those of one app, and celery_worker may have another)"
            )
        else:
            self._unexplained[task_id] = "it ran without a lock, as CELERY_PGLOCK['ENABLED'] is False"

    def _failed(self, task_id: str, exception: BaseException, **_: Any) -> None:
        if task_id in self._unexplained:
            self._unexplained[task_id] = f"it failed before it had a lock: {exception!r}"

    def _was_retried(self, request: Any, reason: Any, **_: Any) -> None:
        if request.id in self._unexplained:
            self._unexplained[request.id] = f"it comes back, as no lock can be taken: {reason}"

    def _was_sent(self, sender: str, **_: Any) -> None:
        self._is_sent = self._is_sent or sender == self.task_name


def assert_ran(task: Any, *, times: int = 1) -> AbstractContextManager[list[advisory]]:
    """In the block the task, or the one of this name, runs as often; gives the locks under which it did.

    All these assertions see what happens in this process, in whatever thread: eager calls, direct ones that
    lock, and those of Celery's ``celery_worker``.
    """
    seen = Observation(task)
    return _expected(seen, seen.locks, RAN, times)


def assert_skipped(task: Any, *, times: int = 1) -> AbstractContextManager[list[TaskConflict]]:
    """In the block the task is skipped as often, as its lock is taken; gives the conflicts."""
    seen = Observation(task)
    return _expected(seen, seen.conflicts["skipped"], "skipped", times)


def assert_retried(task: Any, *, times: int = 1) -> AbstractContextManager[list[TaskConflict]]:
    """In the block the task is put back as often, because its lock is taken; gives the conflicts."""
    seen = Observation(task)
    return _expected(seen, seen.conflicts["retried"], "retried", times)


def assert_raised(task: Any, *, times: int = 1) -> AbstractContextManager[list[TaskConflict]]:
    """In the block the task fails as often, as its lock is taken; gives the conflicts.

    Its ``LockNotAcquired`` may leave the block, by ``.get()`` or an eager call, and goes no further.
    """
    seen = Observation(task)
    return _expected(seen, seen.conflicts["raised"], "raised", times)


@contextmanager
def _expected(seen: Observation, found: list[T], outcome: str, times: int) -> Iterator[list[T]]:
    __tracebackhide__ = True
    with seen.watched():
        try:
            yield found
        except LockNotAcquired:
            if not seen.conflicts["raised"] or outcome != "raised":
                raise
    seen.check(outcome, times)


def _counted(times: int) -> str:
    return COUNTED.get(times, f"{times} times")
