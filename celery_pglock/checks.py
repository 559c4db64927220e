"""System checks: what cannot work is found before a worker runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from celery import current_app
from django.core import checks
from django.db import DatabaseError

from celery_pglock import config, obstructions
from celery_pglock.errors import LockMisuse
from celery_pglock.raw_connections import OnStandby, check_vendor
from celery_pglock.sessions import check_alias
from celery_pglock.task_options import TaskOptions, session_level_aliases, task_side_effect

_binding_all_tasks = ContextVar("_binding_all_tasks", default=False)


def register() -> None:
    """Register the checks with Django; doing it again changes nothing."""
    checks.register(settings_can_work)
    checks.register(tasks_can_work)
    checks.register(locks_exclude, checks.Tags.database)


def settings_can_work(**_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E001``: the setting ``CELERY_PGLOCK`` cannot be used."""
    try:
        settings = config.current()
        config.check_alias(settings.USING, "CELERY_PGLOCK['USING']")
        check_vendor(settings.USING)
        if settings.SIDE_EFFECT is not None:
            task_side_effect(settings.SIDE_EFFECT, "CELERY_PGLOCK['SIDE_EFFECT']")
        obstructions.check_victims()
    except LockMisuse as misuse:
        return [checks.Error(str(misuse), obj="CELERY_PGLOCK", id="celery_pglock.E001")]
    return []


def tasks_can_work(**_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E002``: a task's lock options cannot be used; ``W002``: or may not do what is meant.

    Checking binds all tasks.
    """
    # Celery's Django fixup runs all checks whenever the task modules are imported, as is done here. A worker
    # that starts binds its tasks itself: an error that is caught here would leave its app half finalized.
    if _binding_all_tasks.get() or current_app.loader.worker_initialized:
        return []
    token = _binding_all_tasks.set(True)
    try:
        current_app.loader.import_default_modules()
        current_app.finalize(auto=True)
        for task in current_app.tasks.values():
            task.app  # noqa: B018 - reading it binds the task
        return [*_critical_tasks_that_do_not_wait()]
    except LockMisuse as misuse:
        return [checks.Error(str(misuse), id="celery_pglock.E002")]
    finally:
        _binding_all_tasks.reset(token)


def _critical_tasks_that_do_not_wait() -> Iterator[checks.CheckMessage]:
    for task in current_app.tasks.values():
        options = getattr(task, "_lock_options", None)
        if isinstance(options, TaskOptions) and options.priority and not options.can_wait():
            yield checks.Warning(
                f"Task {task.name} is critical (lock_priority={options.priority}), but it does not wait in "
                f"PostgreSQL for its own lock (lock_timeout=0): nobody is stopped for holding its key.",
                hint=(
                    "Set lock_timeout to more than min_wait of prioritize_critical_tasks and the seconds "
                    "between two of its runs; or silence this, if only what its body waits for matters."
                ),
                obj=task.name,
                id="celery_pglock.W002",
            )


def locks_exclude(databases: Sequence[str] | None = None, **_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E003``: session-level locks of tasks, through this alias, would not exclude.

    Connects, so only for ``manage.py check --database`` and ``migrate``.
    """
    if not databases:
        return []
    try:
        current_app.loader.import_default_modules()
        aliases = session_level_aliases(current_app).keys() & set(databases)
    except LockMisuse:
        # tasks_can_work() tells.
        return []
    return [message for alias in sorted(aliases) for message in _exclusion(alias)]


def _exclusion(alias: str) -> list[checks.CheckMessage]:
    where = f"DATABASES[{alias!r}]"
    try:
        # Not whether strict locks have their table: `migrate`, which makes it, checks first.
        check_alias(alias, strict=False)
    except (LockMisuse, OnStandby) as error:
        return [checks.Error(str(error), obj=where, id="celery_pglock.E003")]
    except DatabaseError as error:
        message = f"Could not check whether locks through it exclude: {str(error).strip()}"
        return [checks.Warning(message, obj=where, id="celery_pglock.W001")]
    return []
