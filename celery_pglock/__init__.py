"""The front door of celery_pglock."""

from celery_pglock.errors import LockError, LockLost, LockMisuse, LockNotAcquired, LockNotHeld, Preempted
from celery_pglock.installations import install
from celery_pglock.keys import advisory_id
from celery_pglock.lock_sequences import ExclusiveLock, ShareLock
from celery_pglock.locks import advisory
from celery_pglock.model_locks import model
from celery_pglock.modes import (
    ACCESS_EXCLUSIVE,
    ACCESS_SHARE,
    EXCLUSIVE,
    ROW_EXCLUSIVE,
    ROW_SHARE,
    SHARE,
    SHARE_ROW_EXCLUSIVE,
    SHARE_UPDATE_EXCLUSIVE,
)
from celery_pglock.priority import Cancel, PrioritizeSideEffect, Terminate, prioritize
from celery_pglock.side_effects import Raise, Retry, Return, SideEffect, Skip
from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask, lock_for
from celery_pglock.task_keys import ALL_ARGUMENTS
from celery_pglock.timeouts import timeout

__version__ = "0.1.0"

__all__ = [
    "ACCESS_EXCLUSIVE",
    "ACCESS_SHARE",
    "ALL_ARGUMENTS",
    "EXCLUSIVE",
    "ROW_EXCLUSIVE",
    "ROW_SHARE",
    "SHARE",
    "SHARE_ROW_EXCLUSIVE",
    "SHARE_UPDATE_EXCLUSIVE",
    "AdvisoryTask",
    "Cancel",
    "ExclusiveLock",
    "LockError",
    "LockLost",
    "LockMisuse",
    "LockNotAcquired",
    "LockNotHeld",
    "Preempted",
    "PrioritizeSideEffect",
    "Raise",
    "Retry",
    "Return",
    "ShareLock",
    "SideEffect",
    "Skip",
    "Terminate",
    "XactAdvisoryTask",
    "__version__",
    "advisory",
    "advisory_id",
    "install",
    "lock_for",
    "model",
    "prioritize",
    "timeout",
]
