"""The front door of celery_pglock."""

from celery_pglock.errors import LockError, LockLost, LockMisuse, LockNotAcquired, LockNotHeld
from celery_pglock.keys import advisory_id
from celery_pglock.locks import advisory
from celery_pglock.priority import Cancel, PrioritizeSideEffect, Terminate, prioritize
from celery_pglock.side_effects import Raise, Retry, Return, SideEffect, Skip
from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask, lock_for
from celery_pglock.task_options import ALL_ARGUMENTS

__version__ = "0.1.0"

__all__ = [
    "ALL_ARGUMENTS",
    "AdvisoryTask",
    "Cancel",
    "LockError",
    "LockLost",
    "LockMisuse",
    "LockNotAcquired",
    "LockNotHeld",
    "PrioritizeSideEffect",
    "Raise",
    "Retry",
    "Return",
    "SideEffect",
    "Skip",
    "Terminate",
    "XactAdvisoryTask",
    "__version__",
    "advisory",
    "advisory_id",
    "lock_for",
    "prioritize",
]
