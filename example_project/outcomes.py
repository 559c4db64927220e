"""What became of every task that was sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from celery import states

from celery_pglock.models import Act
from example_project.celery import app
from example_project.shop.models import Entry
from example_project.shop.tasks import SKIPPED, AddressMissing

TIMES_RUN = {"done": 1, "failed": 1, "skipped": 0}


@dataclass(frozen=True)
class Outcome:
    """The end of one task by the result backend, and how often its body ran by the journal.

    Runs that were stopped for a critical task do not count.
    """

    task: str
    task_id: str
    end: str
    times_run: int
    was_stopped_by_hand: bool

    @property
    def is_sound(self) -> bool:
        """Whether it came to an end, and its body ran as often as that end says.

        What becomes of a task that a person stops is the person's business.
        """
        return self.was_stopped_by_hand or self.times_run == TIMES_RUN.get(self.end)

    def __str__(self) -> str:
        return f"{self.task} {self.task_id}: {self.end}, and its body began {self.times_run} times"


def outcomes() -> list[Outcome]:
    """One for each task that was sent, or met by a worker; a task that comes back stays the same task.

    ``celery call`` in another terminal loads no Django, so nobody there writes into the journal.
    """
    by_hand = set(Act.objects.exclude(through="beat").values_list("task_id", flat=True))
    stopped = Counter(Entry.objects.filter(what="stopped").values_list("task_id", flat=True))
    # A body that works on two resources begins on each of them.
    begun = Counter(Entry.objects.filter(what="starts").values_list("task_id", "resource"))
    times_run: dict[str, int] = {}
    for (task_id, _), times in begun.items():
        times_run[task_id] = max(times, times_run.get(task_id, 0))
    known = Entry.objects.exclude(task_id="").values_list("task", "task_id").distinct()
    return [
        Outcome(
            task, task_id, end_of(task_id), times_run.get(task_id, 0) - stopped[task_id], task_id in by_hand
        )
        for task, task_id in known
    ]


def end_of(task_id: str) -> str:
    """``done``, ``skipped``, ``failed`` as it should, ``left`` without an end, or an error's name."""
    result = app.AsyncResult(task_id)
    if result.state == states.SUCCESS:
        return "skipped" if result.result == SKIPPED else "done"
    if result.state == states.FAILURE:
        return "failed" if isinstance(result.result, AddressMissing) else type(result.result).__name__
    return "left"
