"""The Celery app and the tasks under fault; their bodies tell the journal what they do."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.signals import worker_process_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.faults.settings")

app = Celery("faults")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.set_current()

from django.conf import settings  # noqa: E402 - Celery's fixup sets Django up
from django.db import connections, transaction  # noqa: E402
from django.db.models import F  # noqa: E402

from celery_pglock import AdvisoryTask, Retry, Skip  # noqa: E402
from celery_pglock.errors import LockLost  # noqa: E402
from celery_pglock.keys import key as key_of  # noqa: E402
from celery_pglock.signals import lock_lost, lock_skipped  # noqa: E402
from tests.faults.histories import Journal, now  # noqa: E402

KEYS = ("north", "east", "south")

STEP_EVERY = 0.02
WRITE_EVERY = 0.1

# Of the writes to the ledger every so many-th is two, in a transaction.
TRANSACTION_EVERY = 3

journal = Journal(Path(settings.JOURNAL))
_numbers = itertools.count(1)


class Attempt:
    """One run of a body, and what it does to the places that all share."""

    def __init__(self, task: Task, key: str, seconds: float, lock: Any, *, asks: bool) -> None:
        self.name = f"{os.getpid()}-{next(_numbers)}"
        self.key = key
        self.lock = lock
        # Whoever does not ask before each step relies on being interrupted.
        self.asks = asks
        self._writes = 0
        self.token = lock.token if lock is not None and settings.MODE == "strict" else None
        self._effect(
            "attempt",
            asks=lock is not None,
            task=task.request.id,
            kind=task.name,
            token=self.token,
            seconds=seconds,
        )

    def run(self, seconds: float) -> str:
        started = time.monotonic()
        written = started
        how = "killed"
        try:
            while time.monotonic() < started + seconds:
                self._effect("step", asks=self.asks)
                if self.token is not None and time.monotonic() >= written + WRITE_EVERY:
                    written = time.monotonic()
                    self._write_to_the_ledger()
                time.sleep(STEP_EVERY)
            how = "done"
        except LockLost:
            journal.write("gave up", attempt=self.name, key=self.key)
            how = "LockLost"
            raise
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            journal.write("ended", attempt=self.name, key=self.key, how=how)
        return "done"

    def _effect(self, what: str, *, asks: bool, **details: Any) -> None:
        """Something that no fence protects."""
        asked = None
        if asks:
            asked = now()
            self.lock.check()
        journal.write(what, attempt=self.name, key=self.key, asked=asked, **details)

    def _write_to_the_ledger(self) -> None:
        self._writes += 1
        if self._writes % TRANSACTION_EVERY:
            accepted = self._write()
        else:
            with transaction.atomic():
                accepted = self._write()
                time.sleep(STEP_EVERY)
                # Nobody can have got a newer token since the first write, if that was accepted.
                if self._write() != accepted:
                    journal.write("fence broken", attempt=self.name, key=self.key, token=self.token)
        journal.write("fenced write", attempt=self.name, key=self.key, token=self.token, accepted=accepted)

    def _write(self) -> bool:
        from tests.faults.models import Ledger

        timeline, number = self.token
        rows = self.lock.guard(Ledger.objects.filter(key=self.key)).update(
            timeline=timeline, number=number, writes=F("writes") + 1
        )
        return bool(rows)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def skips(self: Any, key: str, seconds: float, asks: bool) -> str:
    return Attempt(self, key, seconds, self.lock, asks=asks).run(seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(countdown=0.2, maximum=0.8))
def retries(self: Any, key: str, seconds: float, asks: bool) -> str:
    return Attempt(self, key, seconds, self.lock, asks=asks).run(seconds)


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_timeout=2,
    lock_side_effect=Retry(countdown=0.2, maximum=0.8),
)
def waits(self: Any, key: str, seconds: float, asks: bool) -> str:
    return Attempt(self, key, seconds, self.lock, asks=asks).run(seconds)


@app.task(bind=True)
def trusts(self: Any, key: str, seconds: float, asks: bool) -> str:
    """The positive control: a lock on a connection of Django's, in which the body trusts blindly."""
    identifier = key_of(key).arguments[0]
    with connections["locks"].cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [identifier])
        try:
            return Attempt(self, key, seconds, None, asks=False).run(seconds)
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [identifier])


# How often which task is sent, by mode.
MIX = {
    "naive": {trusts: 1},
    "default": {skips: 2, retries: 3, waits: 3},
    "strict": {skips: 2, retries: 3, waits: 3},
}


@worker_process_init.connect
def _tell_of_a_child(**_: Any) -> None:
    journal.write("child", worker=os.getppid())


def _tell_of_a_skip(sender: Task, conflict: Any, **_: Any) -> None:
    holders = [holder.task_id for holder in conflict.holders]
    journal.write("skipped", task=sender.request.id, holders=holders)


def _tell_of_a_loss(sender: Task, reason: str, **_: Any) -> None:
    journal.write("lost", task=sender.request.id, reason=reason)


lock_skipped.connect(_tell_of_a_skip)
lock_lost.connect(_tell_of_a_loss)
