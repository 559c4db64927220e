"""Sessions that stand in for those of tasks and of people, in the pages that show what operators see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery_pglock.keys import key
from celery_pglock.labels import LOCK_SESSION, WORK_CONNECTION, Holding, Owner, application_name, comment
from tests.bystanders import Bystander, bystanders

TASK_ID = "dcabb7c8-127e-4913-bf20-cf2e6fa5a953"
ANOTHER_ID = "280ccf33-c3e0-453f-89c7-9e591b441ea1"
WORKER = "celery@web1"


class Scene:
    """Makes them; all of them are gone at its end."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def task_holds(self, name: str, task: str, task_id: str = TASK_ID) -> Bystander:
        """The lock session of a task, with its lock."""
        session = self._named(LOCK_SESSION, task_id)
        label = self._label(name, task, task_id, time.time())
        session.does(f"{label} SELECT pg_advisory_lock({key(name).arguments[0]})")
        return session

    def task_waits(self, name: str, task: str, task_id: str = ANOTHER_ID) -> Bystander:
        """The lock session of a task that waits for its lock."""
        session = self._named(LOCK_SESSION, task_id)
        session.waits(
            f"{self._label(name, task, task_id, None)} SELECT pg_advisory_lock({key(name).arguments[0]})"
        )
        return session

    def task_works(self, sql: str, task_id: str = TASK_ID) -> Bystander:
        """The work connection of a task, which waits for a lock."""
        session = self._named(WORK_CONNECTION, task_id)
        session.waits(sql)
        return session

    def psql(self, *statements: str) -> Bystander:
        """Somebody at a prompt, who did this."""
        session: Bystander = self._make(application_name="psql")
        session.does(*statements)
        return session

    def _named(self, kind: str, task_id: str) -> Bystander:
        session: Bystander = self._make(application_name=application_name(kind, task_id))
        return session

    def _label(self, name: str, task: str, task_id: str, since: float | None) -> str:
        owner = Owner(task, task_id, WORKER)
        return comment(owner, [Holding(key(name), since)], show_names=True)


@contextmanager
def scene() -> Iterator[Scene]:
    with bystanders() as make:
        yield Scene(make)
