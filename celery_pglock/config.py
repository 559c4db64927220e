"""The settings of a project, from its ``CELERY_PGLOCK`` dict."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from django.conf import settings as django_settings
from django.db import connections

from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockMisuse, did_you_mean

# Named by the reference, built later: refused rather than silently without effect.
NOT_AVAILABLE = frozenset(
    {"LEASE", "POOLER", "STRICT", "ON_LOST"}
    | {"ATTRIBUTES", "BLOCKING_ATTRIBUTES", "CONFIGS", "LIST_LIMIT"}
    | {"HELD_AFTER", "WAITING_AFTER", "SKIPPED_AFTER", "RETENTION", "VICTIMS"}
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field for each key of ``CELERY_PGLOCK``."""

    USING: str = "default"
    """Alias in ``DATABASES`` whose server keeps the locks of tasks."""
    SHOW_NAMES: bool = True
    """Whether the text of a key is written where other database roles may read it."""
    SIDE_EFFECT: Any = None
    """What a task does when its lock is taken; ``None`` stands for ``Retry()``."""
    TIMEOUT: Duration = 0
    """Seconds that a task waits in place for its lock."""
    ENABLED: bool = True
    """``False`` runs everything without any lock."""


def current() -> Settings:
    """The settings as they are now: read at each call, so that tests may override them."""
    given: dict[str, Any] = getattr(django_settings, "CELERY_PGLOCK", {})
    if not isinstance(given, dict):
        raise LockMisuse(f"The setting CELERY_PGLOCK must be a dict, not {given!r}.")
    known = [field.name for field in fields(Settings)]
    for name in given:
        if name in NOT_AVAILABLE:
            raise LockMisuse(f"CELERY_PGLOCK[{name!r}] is not available in this version; remove it.")
        if name not in known:
            raise LockMisuse(f"CELERY_PGLOCK has no key {name!r}.{did_you_mean(str(name), known)}")
    settings = Settings(**given)
    for name in ("SHOW_NAMES", "ENABLED"):
        if not isinstance(getattr(settings, name), bool):
            raise LockMisuse(
                f"CELERY_PGLOCK[{name!r}] must be True or False, not {getattr(settings, name)!r}."
            )
    seconds(settings.TIMEOUT, "CELERY_PGLOCK['TIMEOUT']")
    return settings


def check_alias(alias: Any, where: str) -> None:
    """Refuse a name that is no alias of ``DATABASES``; ``where`` is what the error calls it."""
    if not django_settings.configured:
        return
    aliases = list(connections)
    if alias not in aliases:
        raise LockMisuse(
            f"{where} names {alias!r}, which is not in DATABASES.{did_you_mean(str(alias), aliases)}"
        )
