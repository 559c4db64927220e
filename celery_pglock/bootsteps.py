"""What a worker can do beside its tasks: ``app.steps["worker"].add(PrioritizeCriticalTasks)``."""

from __future__ import annotations

import logging
import threading
from typing import Any, ClassVar

from celery import bootsteps
from django.db import DatabaseError, InterfaceError, connections

from celery_pglock import undisturbed
from celery_pglock.audits import acting
from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockLost, LockMisuse, did_you_mean
from celery_pglock.looks import leave_the_pool
from celery_pglock.tasks import PRIORITIZE, checked, prioritize_critical_tasks

logger = logging.getLogger(__name__)

OPTIONS = ("interval", "dry_run", "min_wait", "grace", "max_victims", "requeue", "using")

# How long a worker that ends waits for a look that is under way, in seconds.
LAST_LOOK = 1.0


class PrioritizeCriticalTasks(bootsteps.StartStopStep):
    """Do what the task ``prioritize_critical_tasks`` does, in a thread of the worker's main process.

    It needs no queue and no free slot. Of all workers that have it, and of the task, one at a time looks.
    Subclass it for other options, which are those of the task, and ``interval``: seconds between two looks.
    """

    # After the first children are forked: the less a fork finds under way, the better.
    requires: tuple[type[bootsteps.Step] | str, ...] = ("celery.worker.components:Pool",)

    interval: ClassVar[Duration] = 10
    dry_run: ClassVar[bool] = False
    min_wait: ClassVar[Duration] = 10
    grace: ClassVar[Duration] = 5
    max_victims: ClassVar[int] = 5
    requeue: ClassVar[bool] = True
    using: ClassVar[str | None] = None

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        # SystemExit, as the hooks of a worker that starts refuse what cannot work.
        try:
            self._refuse_unknown_options()
            self._terms = checked(
                dry_run=self.dry_run,
                min_wait=self.min_wait,
                grace=self.grace,
                max_victims=self.max_victims,
                requeue=self.requeue,
                using=self.using,
            )
            self._interval = _more_than_0(self.interval)
        except LockMisuse as misuse:
            raise SystemExit(f"{type(self).__name__}: {misuse}") from None

    def _refuse_unknown_options(self) -> None:
        ours = type(self).__mro__[: type(self).__mro__.index(PrioritizeCriticalTasks)]
        for name in [name for one in ours for name in vars(one) if not name.startswith("_")]:
            if not hasattr(PrioritizeCriticalTasks, name):
                raise LockMisuse(f"there is no option {name!r}.{did_you_mean(name, OPTIONS)}")

    def create(self, parent: Any) -> Any:
        return _Lookout(self._terms, self._interval)


class _WorkerEnds(Exception):
    pass


class _Lookout:
    """The thread that looks after critical tasks for as long as its worker runs."""

    def __init__(self, terms: Any, interval: float) -> None:
        self._terms = terms
        self._interval = interval
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._look_again_and_again, name="pglock-prioritize-critical", daemon=True
        )

    def start(self) -> None:
        logger.info("Looking every %g s after critical tasks on alias %r", self._interval, self._terms.using)
        undisturbed.start(self._thread)

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(LAST_LOOK)

    def _look_again_and_again(self) -> None:
        leave_the_pool(connections[self._terms.using])
        while not self._is_over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        try:
            with (
                prioritize_critical_tasks.lock_for(using=self._terms.using) as is_mine,
                acting("bootstep", PRIORITIZE),
            ):
                if is_mine:
                    self._terms.clear(self._pause)
        except _WorkerEnds:
            logger.info("The worker ends: its last look after critical tasks is not ended")
        except LockMisuse as misuse:
            logger.error("The way of critical tasks cannot be cleared: %s", misuse)
        except (DatabaseError, InterfaceError, LockLost) as error:
            logger.warning("The way of critical tasks is not cleared this time: %s", str(error).strip())
        except Exception:
            logger.exception("The way of critical tasks is not cleared this time")
        finally:
            # A child that is forked between two looks inherits no connection of Django's.
            connections[self._terms.using].close()

    def _pause(self, seconds: float) -> None:
        if self._is_over.wait(seconds):
            raise _WorkerEnds


def _more_than_0(interval: Duration) -> float:
    found = seconds(interval, "interval")
    if not found:
        raise LockMisuse(f"interval must be more than 0 seconds, not {interval!r}.")
    return found
