"""System checks: what cannot work is found before a worker runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from celery import current_app
from celery._state import _get_active_apps  # type: ignore[attr-defined] # the stubs leave it out
from django.apps import apps
from django.conf import settings as django_settings
from django.core import checks

from celery_pglock import config, server_checks, task_checks
from celery_pglock.errors import LockMisuse
from celery_pglock.findings import error, warning
from celery_pglock.raw_connections import check_vendor
from celery_pglock.task_options import Locked, task_side_effect

_binding_all_tasks = ContextVar("_binding_all_tasks", default=False)


def register() -> None:
    """Register the checks with Django; doing it again changes nothing.

    A project without the app in ``INSTALLED_APPS`` may do so in its own ``AppConfig.ready()``.
    """
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
        if apps.is_installed("celery_pglock"):
            # Its models can be imported only with the app.
            from celery_pglock import obstructions

            obstructions.check_victims()
    except LockMisuse as misuse:
        return [
            error(
                "E001",
                str(misuse),
                hint="Workers do not start before CELERY_PGLOCK in the settings of Django can be used.",
                obj="CELERY_PGLOCK",
            )
        ]
    return []


def tasks_can_work(**_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E002``: a task's lock options cannot be used; others: they may not do what is meant.

    Checking binds all tasks.
    """
    # Celery's Django fixup runs all checks whenever the task modules are imported, as is done here. A worker
    # that starts binds its tasks itself, and refuses at once.
    if _binding_all_tasks.get() or current_app.loader.worker_initialized:
        return []
    if _is_without_its_app():
        return [_no_app_was_loaded()]
    try:
        locked, refused = _bound()
    except Exception as failure:
        return [_not_read(failure)]
    # Tasks cannot be held against settings that cannot be used, of which settings_can_work() tells.
    return refused if settings_can_work() else [*refused, *task_checks.findings(current_app, locked)]


def _is_without_its_app() -> bool:
    # Whoever uses no Celery has no settings of it, either. Celery makes an app called so if there is none.
    uses_celery = any(name.startswith("CELERY_") and name != "CELERY_PGLOCK" for name in dir(django_settings))
    return uses_celery and all(app.main == "default" for app in tuple(_get_active_apps()))


def _no_app_was_loaded() -> checks.CheckMessage:
    return warning(
        "W013",
        "No Celery app was loaded when Django started, so that no task is checked.",
        hint="Import it in the __init__.py of the project: from .celery import app as celery_app.",
        obj="Celery",
    )


def _not_read(failure: Exception) -> checks.CheckMessage:
    # A warning: where web servers migrate, what only workers have may be missing.
    return warning(
        "W012",
        f"The tasks could not be read, so that none is checked: {type(failure).__name__}: {failure}".strip(),
        hint="Check where workers run: one that starts meets the same error.",
        obj="Celery",
    )


def _bound() -> tuple[list[Locked], list[checks.CheckMessage]]:
    token = _binding_all_tasks.set(True)
    try:
        return task_checks.bind_all(current_app)
    finally:
        _binding_all_tasks.reset(token)


def locks_exclude(databases: Sequence[str] | None = None, **_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E003``: session-level locks of tasks, through these aliases, would not exclude.

    And what else their servers tell. Connects, so only for ``manage.py check --database`` and ``migrate``.
    """
    if not databases or settings_can_work():
        return []
    try:
        locked = _bound()[0]
    except Exception:
        # tasks_can_work() tells of it.
        return []
    return [found for alias in databases for found in server_checks.findings(current_app, locked, alias)]
