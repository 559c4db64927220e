"""System checks: what cannot work is found before a worker runs it."""

from __future__ import annotations

from typing import Any

from celery import current_app
from django.core import checks

from celery_pglock import config
from celery_pglock.errors import LockMisuse


def register() -> None:
    """Register the checks with Django; doing it again changes nothing."""
    checks.register(settings_can_work)
    checks.register(tasks_can_work)


def settings_can_work(**_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E001``: the setting ``CELERY_PGLOCK`` cannot be used."""
    try:
        config.current()
    except LockMisuse as misuse:
        return [checks.Error(str(misuse), obj="CELERY_PGLOCK", id="celery_pglock.E001")]
    return []


def tasks_can_work(**_: Any) -> list[checks.CheckMessage]:
    """``celery_pglock.E002``: a task's lock options cannot be used. Checking binds all tasks."""
    try:
        current_app.loader.import_default_modules()
        current_app.finalize(auto=True)
        for task in current_app.tasks.values():
            task.app  # noqa: B018 - reading it binds the task
    except LockMisuse as misuse:
        return [checks.Error(str(misuse), id="celery_pglock.E002")]
    return []
