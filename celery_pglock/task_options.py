"""What a task says about its lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from django.conf import settings as django_settings

from celery_pglock.claims import LOCK_DELAY
from celery_pglock.config import check_alias, check_on_lost, current
from celery_pglock.durations import UNSET, seconds
from celery_pglock.errors import LockMisuse, did_you_mean
from celery_pglock.keys import ENDLESS_HALF
from celery_pglock.locks import advisory, check_limit
from celery_pglock.side_effects import Retry, Return, SideEffect, side_effect
from celery_pglock.task_keys import TaskKey, task_key

OPTIONS: Final = {
    "lock_key": UNSET,
    "lock_by": UNSET,
    "lock_shared": False,
    "lock_xact": False,
    "lock_limit": 1,
    "lock_timeout": UNSET,
    "lock_side_effect": UNSET,
    "lock_using": UNSET,
    "lock_on_direct_call": False,
    "lock_on_lost": UNSET,
    "lock_strict": UNSET,
    "lock_priority": 0,
}

# The methods of a task that share the options' prefix.
METHODS: Final = ("lock_for", "lock_options")


@dataclass(frozen=True)
class TaskOptions:
    """The lock options of one task, checked against its signature."""

    task_name: str
    key: TaskKey
    shared: bool
    xact: bool
    limit: int | Callable[..., Any]
    timeout: Any
    side_effect: Any
    using: Any
    on_direct_call: bool
    on_lost: Any
    strict: Any
    priority: int

    def is_strict(self) -> bool:
        """Whether the lock comes with a fencing token."""
        # A transaction-level lock needs none: its work is rolled back with it.
        return current().STRICT and not self.xact if self.strict is UNSET else bool(self.strict)

    def alias(self) -> str:
        """The alias in ``DATABASES`` whose server keeps the lock."""
        return str(current().USING if self.using is UNSET else self.using)

    def what_if_lost(self) -> str:
        """What happens when the lock's session is lost during the body."""
        return str(current().ON_LOST if self.on_lost is UNSET else self.on_lost)

    def wait(self) -> float | None:
        """Seconds that the task waits in place for its lock; ``None`` for ever."""
        return seconds(current().TIMEOUT if self.timeout is UNSET else self.timeout, "lock_timeout")

    def check_settings(self, limits: Mapping[str, float]) -> None:
        """Refuse what cannot work with the project's settings as they are now.

        ``limits`` are the time limits in force, in seconds by their names.
        """
        if self.is_strict() and (self.shared or (not callable(self.limit) and self.limit > 1)):
            raise _not_strict(self.task_name)
        name = "CELERY_PGLOCK['TIMEOUT']" if self.timeout is UNSET else "lock_timeout"
        try:
            _check_wait(self.wait(), name, limits)
            if self.is_strict():
                _check_delay(current().lease, limits)
        except LockMisuse as misuse:
            raise _wrong(self.task_name, str(misuse)) from None

    def effect(self) -> SideEffect:
        """What the task does when its lock is taken."""
        if self.side_effect is not UNSET:
            return task_side_effect(self.side_effect, "lock_side_effect")
        default = current().SIDE_EFFECT
        return Retry() if default is None else task_side_effect(default, "CELERY_PGLOCK['SIDE_EFFECT']")

    def lock(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> advisory:
        """The lock of one call; raises TypeError for arguments that the task does not take."""
        settings = current()
        limit = self.limit
        if callable(limit):
            limit = limit(*args, **kwargs)
            check_limit(limit, "lock_limit")
        strict = settings.STRICT and not self.xact if self.strict is UNSET else self.strict
        if strict and (self.shared or limit > 1):
            raise _not_strict(self.task_name)
        lock = advisory(
            *self.key.identifiers(args, kwargs),
            shared=self.shared,
            xact=self.xact,
            limit=limit,
            using=settings.USING if self.using is UNSET else self.using,
            timeout=settings.TIMEOUT if self.timeout is UNSET else self.timeout,
        )
        return lock.strictly() if strict else lock


def options_on(task: type[Any]) -> dict[str, Any]:
    """The options that are attributes of a task class; ``LockMisuse`` for names that only look like one."""
    check_names([name for name in dir(task) if name not in METHODS], f"Task {task.name}")
    # Read from the class: a function stored there would become a method of the task.
    return {name: getattr(task, name) for name in OPTIONS if hasattr(task, name)}


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names with the options' prefix that are none of them; ``where`` is what an error calls it."""
    for name in names:
        if name.startswith("lock_") and name not in OPTIONS:
            raise LockMisuse(
                f"{where}: there is no option {name!r}, and the prefix lock_ is reserved."
                f"{did_you_mean(name, OPTIONS)}"
            )


def options_of(task: type[Any], stated: Mapping[str, Any]) -> TaskOptions:
    """What was said about the lock of a task class; what cannot work is refused with ``LockMisuse``."""
    given: dict[str, Any] = {**OPTIONS, **stated}
    key = task_key(task, given["lock_key"], given["lock_by"])
    limit = given["lock_limit"]
    try:
        if not callable(limit):
            check_limit(limit, "lock_limit")
        for name in ("lock_shared", "lock_xact", "lock_on_direct_call"):
            if not isinstance(given[name], bool):
                raise LockMisuse(f"{name} must be True or False, not {given[name]!r}.")
        if given["lock_strict"] is not UNSET and not isinstance(given["lock_strict"], bool):
            raise LockMisuse(f"lock_strict must be True or False, not {given['lock_strict']!r}.")
        _check_priority(given["lock_priority"])
        if given["lock_on_lost"] is not UNSET:
            check_on_lost(given["lock_on_lost"], "lock_on_lost")
        if given["lock_using"] is not UNSET:
            check_alias(given["lock_using"], "lock_using")
        if given["lock_timeout"] is not UNSET:
            wait = seconds(given["lock_timeout"], "lock_timeout")
            _check_wait(wait, "lock_timeout", time_limits(task))
        if given["lock_side_effect"] is not UNSET:
            task_side_effect(given["lock_side_effect"], "lock_side_effect")
    except LockMisuse as misuse:
        raise _wrong(task.name, str(misuse)) from None
    if given["lock_shared"] and limit != 1:
        raise _wrong(task.name, "shared holders are not counted: use lock_shared or lock_limit, not both.")
    if given["lock_strict"] is True and (given["lock_shared"] or limit != 1):
        raise _not_strict(task.name)
    if given["lock_strict"] is True and django_settings.configured:
        try:
            _check_delay(current().lease, time_limits(task))
        except LockMisuse as misuse:
            raise _wrong(task.name, str(misuse)) from None
    for name in ("lock_on_lost", "lock_strict"):
        if given["lock_xact"] and given[name] not in (UNSET, False):
            raise _wrong(
                task.name,
                f"{name} is for session-level locks, and with lock_xact the work is rolled back with the "
                f"lock: remove one of them.",
            )
    return TaskOptions(
        task_name=task.name,
        key=key,
        shared=given["lock_shared"],
        xact=given["lock_xact"],
        limit=limit,
        timeout=given["lock_timeout"],
        side_effect=given["lock_side_effect"],
        using=given["lock_using"],
        on_direct_call=given["lock_on_direct_call"],
        on_lost=given["lock_on_lost"],
        strict=given["lock_strict"],
        priority=given["lock_priority"],
    )


Locked: TypeAlias = tuple[Any, TaskOptions]
"""A task that takes locks, with its options."""


def session_level_aliases(app: Any) -> dict[str, bool]:
    """The aliases whose servers keep session-level locks of the app's tasks, and whether strict ones.

    Binds all its tasks; ``LockMisuse`` for one that cannot be.
    """
    app.finalize(auto=True)
    # Reading a task's app binds the task. One that could not be bound before is refused here.
    tasks = [task for task in app.tasks.values() if task.app and hasattr(task, "_lock_options")]
    found = [(task.name, task.lock_options()) for task in tasks]
    return aliases_of(options for name, options in found if options is not None and not is_ours(name))


def aliases_of(options: Iterable[TaskOptions]) -> dict[str, bool]:
    """The aliases of those that are session-level, and whether any is strict."""
    strict_by_alias: dict[str, bool] = {}
    if current().ENABLED:
        for one in options:
            if not one.xact:
                strict_by_alias[one.alias()] = strict_by_alias.get(one.alias(), False) or one.is_strict()
    return strict_by_alias


def is_ours(task_name: str) -> bool:
    """Whether the task is there in every project, and may never run."""
    return task_name.startswith("celery_pglock.")


def states_an_option(task: type[Any]) -> bool:
    """Whether an option was given to this very task, not to a base class for many."""
    return any(name in vars(task) for name in OPTIONS)


def time_limits(task: Any) -> dict[str, float]:
    """The time limits in force for a task that is bound, in seconds by their names: its own, or its app's.

    A worker may have been started with others for tasks that have none of their own.
    """
    conf = task.app.conf
    limits = {
        name: getattr(task, name, None) or conf[f"task_{name}"] for name in ("soft_time_limit", "time_limit")
    }
    return {name: limit for name, limit in limits.items() if limit}


def time_limit_of_its_own(task: Any) -> float:
    """The time limit that was stated for this task, in seconds; 0 if none was."""
    # Celery 5.7 gives each task those of its app.
    limit: float | None = task.time_limit
    return 0 if limit is None or limit == task.app.conf.task_time_limit else limit


def _check_delay(lease: float, limits: Mapping[str, float]) -> None:
    delay = LOCK_DELAY * lease
    for name, limit in limits.items():
        if limit <= delay:
            raise LockMisuse(
                f"after a holder that did not leave in order a strict lock is delayed by {delay:g} s (of "
                f"CELERY_PGLOCK['LEASE']), which leaves nothing of {name} ({limit:g} s): each run would end "
                f"in its delay. Raise the limit, or lower LEASE."
            )


def _not_strict(task_name: str) -> LockMisuse:
    return LockMisuse(
        f"Task {task_name}: a fencing token is one holder's alone: lock_strict (or CELERY_PGLOCK['STRICT']) "
        f"does not go with lock_shared or lock_limit. Set lock_strict=False on this task, or leave those out."
    )


def _wrong(task_name: str, why: str) -> LockMisuse:
    return LockMisuse(f"Task {task_name}: {why}")


def _check_priority(given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < ENDLESS_HALF:
        raise LockMisuse(
            f"lock_priority must be an int of 0 or more, not {given!r}: above 0 a task is critical."
        )


def _check_wait(wait: float | None, wait_name: str, limits: Mapping[str, float]) -> None:
    for name, limit in limits.items():
        # Time limits run from the moment a worker accepts the task: waiting counts.
        if wait is not None and wait >= limit:
            raise LockMisuse(
                f"{wait_name} ({wait:g} s) leaves nothing of {name} ({limit:g} s), as waiting counts."
            )


def task_side_effect(given: object, where: str) -> SideEffect:
    """The side effect as an instance, if a task can have it; ``where`` is what an error calls it."""
    effect = side_effect(given, where)
    if isinstance(effect, Return):
        raise LockMisuse(
            f"{where}: Return would run the body without its lock; use Skip(), Raise() or Retry()."
        )
    return effect
