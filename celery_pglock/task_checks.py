"""What can be found wrong with an app's tasks without asking a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage

from celery_pglock import config
from celery_pglock.brokers import visibility_timeout
from celery_pglock.durations import UNSET
from celery_pglock.errors import LockMisuse
from celery_pglock.findings import error, warning
from celery_pglock.installations import in_vain
from celery_pglock.schedules import entries_of_ours
from celery_pglock.side_effects import Retry, SideEffect, side_effect
from celery_pglock.task_classes import LockedTask, refusing_later
from celery_pglock.task_options import OPTIONS, Locked, TaskOptions, time_limit_of_its_own, time_limits


def bind_all(app: Any) -> tuple[list[Locked], list[CheckMessage]]:
    """The tasks that take locks, with their options, and ``E002`` for each whose options cannot be used."""
    with refusing_later():
        app.loader.import_default_modules()
        app.finalize(auto=True)
        # Reading a task's app binds the task.
        tasks = [task for task in app.tasks.values() if task.app and hasattr(task, "_lock_options")]
    locked: list[Locked] = []
    refused: list[CheckMessage] = []
    for task in sorted(tasks, key=lambda task: str(task.name)):
        options = _options_or_refusal(task)
        if isinstance(options, TaskOptions):
            locked.append((task, options))
        elif options is not None:
            refused.append(options)
    return locked, refused


def _options_or_refusal(task: Any) -> TaskOptions | CheckMessage | None:
    try:
        options: TaskOptions | None = task.lock_options()
    except LockMisuse as misuse:
        return error(
            "E002",
            str(misuse),
            hint="Mend it where it is stated: @app.task(...), a base class, task_annotations or install().",
            obj=task.name,
        )
    return options


def findings(app: Any, locked: Sequence[Locked]) -> Iterator[CheckMessage]:
    """All but ``E002``; ``LockMisuse`` if the project's settings cannot be used."""
    yield from _beat_without_the_app(app)
    yield from _tasks_without_locks(app)
    yield from _options_in_vain(app)
    yield from _retries_that_never_come(config.current().SIDE_EFFECT, "CELERY_PGLOCK['SIDE_EFFECT']")
    yield from _wait_for_ever(locked)
    redelivers_after = _redelivers_after(app)
    for task, options in locked:
        limits = time_limits(task)
        yield from _does_not_go_with_settings(task, options, limits)
        yield from _is_critical_and_does_not_wait(task, options)
        if options.side_effect is not UNSET:
            yield from _retries_that_never_come(options.side_effect, task.name)
        if task.acks_late and redelivers_after is not None:
            yield from _is_delivered_again(task, options, limits, redelivers_after)


def _beat_without_the_app(app: Any) -> Iterator[CheckMessage]:
    if apps.is_installed("celery_pglock"):
        return
    for name, task_name, _ in entries_of_ours(app):
        yield error(
            "E005",
            f"Beat sends {task_name} (by its entry {name!r}), which cannot work: 'celery_pglock' is not in "
            f"INSTALLED_APPS.",
            hint="Add 'celery_pglock' to INSTALLED_APPS and run manage.py migrate, or remove the entry.",
            obj="INSTALLED_APPS",
        )


def _tasks_without_locks(app: Any) -> Iterator[CheckMessage]:
    for name, task in sorted(app.tasks.items()):
        if isinstance(task, LockedTask) or getattr(task, "_lock_options", None) is not None:
            continue
        if stated := [option for option in OPTIONS if hasattr(task, option)]:
            yield warning(
                "W007",
                f"Task {name} has {', '.join(stated)}, and takes no lock: its base class is none of ours.",
                hint=(
                    "Give it base=AdvisoryTask, or name it in the rules of install(); if the attribute is "
                    "another library's, silence this."
                ),
                obj=name,
            )


def _options_in_vain(app: Any) -> Iterator[CheckMessage]:
    for where, sentence in in_vain(app):
        yield warning(
            "W011",
            sentence,
            hint="Its tasks run without that lock: correct the name, or remove it.",
            obj=where,
        )


def _retries_that_never_come(given: Any, where: str) -> Iterator[CheckMessage]:
    effect: SideEffect | None = None if given is None else side_effect(given, where)
    # A subclass may decide otherwise.
    if type(effect) is Retry and not effect.can_retry():
        yield warning(
            "W005",
            f"{effect} never retries: its first delay already ends after its deadline.",
            hint="Make deadline longer than countdown, or use what its then= says instead of it.",
            obj=where,
        )


def _does_not_go_with_settings(
    task: Any, options: TaskOptions, limits: dict[str, float]
) -> Iterator[CheckMessage]:
    try:
        options.check_settings(limits)
    except LockMisuse as misuse:
        yield error(
            "E004",
            str(misuse),
            hint=(
                "State on this task what works, its lock_timeout, its time_limit or lock_strict=False; or "
                "change the setting."
            ),
            obj=task.name,
        )


def _is_critical_and_does_not_wait(task: Any, options: TaskOptions) -> Iterator[CheckMessage]:
    if options.priority and options.wait() == 0:
        yield warning(
            "W002",
            f"Task {task.name} is critical (lock_priority={options.priority}), but it does not wait in "
            f"PostgreSQL for its own lock (lock_timeout=0): nobody is stopped for holding its key.",
            hint=(
                "Set lock_timeout to more than min_wait of prioritize_critical_tasks and the seconds "
                "between two of its runs; or silence this, if only what its body waits for matters."
            ),
            obj=task.name,
        )


def _wait_for_ever(locked: Iterable[Locked]) -> Iterator[CheckMessage]:
    endless = [
        (task, options) for task, options in locked if options.wait() is None and not time_limits(task)
    ]
    by_default = [task.name for task, options in endless if options.timeout is UNSET]
    for task, options in endless:
        if options.timeout is not UNSET:
            yield _waits_for_ever(f"Task {task.name}", "lock_timeout=None", task.name)
    if by_default:
        number = f" and {len(by_default) - 3} more" if len(by_default) > 3 else ""
        who = f"Every task without lock_timeout ({', '.join(by_default[:3])}{number})"
        yield _waits_for_ever(who, "TIMEOUT=None", "CELERY_PGLOCK['TIMEOUT']")


def _waits_for_ever(who: str, why: str, where: str) -> CheckMessage:
    return warning(
        "W003",
        f"{who} waits for its lock for ever ({why}), and has no time limit: it keeps a slot of its worker "
        f"for as long as somebody holds the key.",
        hint="State seconds to wait or a time_limit; or do not wait (0), and come back by Retry().",
        obj=where,
    )


def _redelivers_after(app: Any) -> float | None:
    try:
        return visibility_timeout(app)
    except (ImportError, KeyError):
        # A process that sends nothing may do without the broker's client library.
        return None


def _is_delivered_again(
    task: Any, options: TaskOptions, limits: dict[str, float], after: float
) -> Iterator[CheckMessage]:
    ends = [time for time in (options.wait(), *limits.values()) if time is not None]
    forgets = task.ignore_result or task.app.conf.result_backend in (None, "disabled")
    if min(ends, default=after) >= after:
        what = "while it waits for its lock: the copy takes another slot, and may run once more"
    elif time_limit_of_its_own(task) > after and forgets:
        what = (
            "while it runs, if it takes as long as its time_limit allows: its result is not kept, so the "
            "copy cannot know that it succeeded, and runs once more"
        )
    else:
        return
    yield warning(
        "W006",
        f"Task {task.name} is acknowledged late, and after {after:g} s (visibility_timeout) its message is "
        f"delivered again {what}.",
        hint=(
            "Set visibility_timeout in broker_transport_options to more than the task waits and runs, or "
            "lower its lock_timeout or its time_limit."
        ),
        obj=task.name,
    )
