"""The settings of a project, from its ``CELERY_PGLOCK`` dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

from django.conf import settings as django_settings
from django.db import connections

from celery_pglock.durations import Duration, seconds
from celery_pglock.errors import LockMisuse, did_you_mean

# The settings of django-pglock that stand in for those of ours that are not given.
OF_DJANGO_PGLOCK = {
    "ATTRIBUTES": "PGLOCK_ATTRIBUTES",
    "BLOCKING_ATTRIBUTES": "PGLOCK_BLOCKING_ATTRIBUTES",
    "CONFIGS": "PGLOCK_CONFIGS",
    "LIST_LIMIT": "PGLOCK_LIMIT",
}

WAYS_TO_STOP = frozenset({"cancel", "terminate"})

ON_LOST = ("interrupt", "fail", "warn")

# Shorter ones would end sessions whose holders are only slow; with longer ones nobody would wait for it.
SHORTEST_LEASE = 1.0
LONGEST_LEASE = 3600.0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What one look of an operator is about; the options of the command ``pglock`` have the same names."""

    database: str | None = None
    pids: Sequence[int] = ()
    filters: Sequence[str] = ()
    on: Sequence[str] = ()
    blocking: bool = False
    attributes: Sequence[str] = ()
    limit: int | None = None
    expanded: bool = False
    yes: bool = False
    cancel: bool = False
    terminate: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field for each key of ``CELERY_PGLOCK``."""

    USING: str = "default"
    """Alias in ``DATABASES`` whose server keeps the locks of tasks."""
    LEASE: Duration = 30
    """Seconds after which the server ends a lock session that has fallen silent."""
    POOLER: str | None = None
    """``"session"`` if a connection pooler before the server runs in session mode."""
    STRICT: bool = False
    """Whether tasks take their locks with a fencing token and a lock-delay."""
    ON_LOST: str = "interrupt"
    """What happens when a lock's session is lost during the body."""
    SHOW_NAMES: bool = True
    """Whether the text of a key is written where other database roles may read it."""
    SIDE_EFFECT: Any = None
    """What a task does when its lock is taken; ``None`` stands for ``Retry()``."""
    TIMEOUT: Duration = 0
    """Seconds that a task waits in place for its lock."""
    ENABLED: bool = True
    """``False`` runs everything without any lock."""
    ATTRIBUTES: Sequence[str] = (
        "activity_id",
        "activity__duration",
        "granted",
        "type",
        "mode",
        "rel_name",
        "name",
        "task_name",
        "task_id",
        "worker",
        "activity__query",
    )
    """What the command ``pglock`` shows of a lock."""
    BLOCKING_ATTRIBUTES: Sequence[str] = (
        "activity_id",
        "blocking_activity_id",
        "wait_duration",
        "type",
        "mode",
        "rel_name",
        "name",
        "task_id",
        "blocking_activity__application_name",
        "blocking_activity__state",
        "blocking_activity__query",
    )
    """What ``pglock --blocking`` shows of a wait."""
    CONFIGS: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of the command by the names of configurations."""
    LIST_LIMIT: int | None = 25
    """How many rows the command shows; ``None`` shows all."""
    HELD_AFTER: Duration = 300
    """Seconds after which a report tells of an advisory lock that is held; ``None`` never does."""
    WAITING_AFTER: Duration = 60
    """Seconds after which a report tells of a wait for a lock; ``None`` never does."""
    SKIPPED_AFTER: int = 10
    """How many skips because of one key, in this hour and the last, a report tells of; 1 or more."""
    RETENTION: Duration = timedelta(days=30)
    """How long reports and hourly counts are kept, in seconds; ``None`` keeps them for ever."""
    VICTIMS: Sequence[str] | None = (
        "application_name__startswith=celery:",
        "application_name__startswith=pglock:",
    )
    """Filters on ``PGActivity``: whom any of them finds may be stopped for a critical task; ``None``: all."""

    @property
    def lease(self) -> float:
        """``LEASE`` in seconds."""
        return seconds(self.LEASE, "CELERY_PGLOCK['LEASE']") or 0.0


UNKNOWN = object()
_checked: tuple[dict[str, Any], Settings] | None = None


def current() -> Settings:
    """The settings as they are now: read at each call, so that tests may override them."""
    global _checked
    given: dict[str, Any] = getattr(django_settings, "CELERY_PGLOCK", {})
    # Each lock asks, and nearly always they are those of the last time: the very same values.
    if _checked is not None and isinstance(given, dict):
        before, settings = _checked
        if len(given) == len(before):
            for name, value in given.items():
                if before.get(name, UNKNOWN) is not value:
                    break
            else:
                return settings
    settings = _checked_settings(given)
    _checked = (dict(given), settings)
    return settings


def with_django_pglocks() -> Settings:
    """The current settings, completed by those of django-pglock."""
    settings = current()
    given = getattr(django_settings, "CELERY_PGLOCK", {})
    theirs = {
        name: getattr(django_settings, old)
        for name, old in OF_DJANGO_PGLOCK.items()
        if name not in given and hasattr(django_settings, old)
    }
    return replace(settings, **theirs)


def _checked_settings(given: Any) -> Settings:
    if not isinstance(given, dict):
        raise LockMisuse(f"The setting CELERY_PGLOCK must be a dict, not {given!r}.")
    known = [setting.name for setting in fields(Settings)]
    for name in given:
        if name not in known:
            raise LockMisuse(f"CELERY_PGLOCK has no key {name!r}.{did_you_mean(str(name), known)}")
    settings = Settings(**given)
    for name in ("SHOW_NAMES", "ENABLED", "STRICT"):
        if not isinstance(getattr(settings, name), bool):
            raise LockMisuse(
                f"CELERY_PGLOCK[{name!r}] must be True or False, not {getattr(settings, name)!r}."
            )
    seconds(settings.TIMEOUT, "CELERY_PGLOCK['TIMEOUT']")
    if not SHORTEST_LEASE <= settings.lease <= LONGEST_LEASE:
        raise LockMisuse(
            f"CELERY_PGLOCK['LEASE'] must be between {SHORTEST_LEASE:g} and {LONGEST_LEASE:g} seconds, not "
            f"{settings.LEASE!r}."
        )
    if settings.POOLER not in (None, "session"):
        raise LockMisuse(
            f"CELERY_PGLOCK['POOLER'] must be None or 'session', not {settings.POOLER!r}: through a pooler "
            f"in another mode session-level locks exclude nobody."
        )
    check_on_lost(settings.ON_LOST, "CELERY_PGLOCK['ON_LOST']")
    seconds(settings.HELD_AFTER, "CELERY_PGLOCK['HELD_AFTER']")
    seconds(settings.WAITING_AFTER, "CELERY_PGLOCK['WAITING_AFTER']")
    check_count(settings.SKIPPED_AFTER, "CELERY_PGLOCK['SKIPPED_AFTER']")
    if seconds(settings.RETENTION, "CELERY_PGLOCK['RETENTION']") == 0:
        raise LockMisuse(
            f"CELERY_PGLOCK['RETENTION'] must be longer than 0 seconds, or None to keep everything, not "
            f"{settings.RETENTION!r}."
        )
    _check_victims(settings.VICTIMS)
    return settings


def chosen(name: str | None, overrides: Mapping[str, Any]) -> Chosen:
    """A configuration of ``CELERY_PGLOCK["CONFIGS"]``, or none, with the overrides that are not empty.

    A limit of 0 is given; and one way to stop backends takes the place of the other.
    """
    settings = with_django_pglocks()
    options: dict[str, Any] = {}
    if name is not None:
        configs = settings.CONFIGS
        if not isinstance(configs, Mapping):
            raise LockMisuse(f"CELERY_PGLOCK['CONFIGS'] must be a dict, not {configs!r}.")
        if name not in configs:
            raise LockMisuse(
                f"CELERY_PGLOCK['CONFIGS'] has no configuration {name!r}.{did_you_mean(str(name), configs)}"
            )
        if not isinstance(configs[name], Mapping):
            raise LockMisuse(f"The configuration {name!r} must be a dict of options, not {configs[name]!r}.")
        options |= configs[name]
    given = {
        option: value for option, value in overrides.items() if value or (value == 0 and value is not False)
    }
    if given.keys() & WAYS_TO_STOP:
        options = {option: value for option, value in options.items() if option not in WAYS_TO_STOP}
    options |= given
    known = [option.name for option in fields(Chosen)]
    for option in options:
        if option not in known:
            raise LockMisuse(
                f"{option!r} is no option of the configuration {name!r}.{did_you_mean(str(option), known)}"
            )
    for option in ("pids", "filters", "on", "attributes"):
        several = options.get(option, ())
        if isinstance(several, str) or not isinstance(several, Iterable):
            raise LockMisuse(f"{option!r} of the configuration {name!r} must be a list, not {several!r}.")
    if options.get("database") is not None:
        check_alias(options["database"], f"'database' of the configuration {name!r}")
    if options.get("cancel") and options.get("terminate"):
        raise LockMisuse("A backend is cancelled or terminated, not both.")
    blocking = options.get("blocking", False)
    options.setdefault("attributes", settings.BLOCKING_ATTRIBUTES if blocking else settings.ATTRIBUTES)
    options.setdefault("limit", settings.LIST_LIMIT)
    return Chosen(**options)


def _check_victims(given: Any) -> None:
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if given is not None and not (is_list and all(isinstance(one, str) for one in given)):
        raise LockMisuse(
            f"CELERY_PGLOCK['VICTIMS'] must be a list of filters such as "
            f"['application_name__startswith=celery:'], or None for everybody, not {given!r}."
        )


def check_on_lost(given: Any, where: str) -> None:
    """Refuse what is none of the ways to take a loss; ``where`` is what the error calls it."""
    if given not in ON_LOST:
        raise LockMisuse(
            f"{where} must be one of {', '.join(map(repr, ON_LOST))}, not {given!r}."
            f"{did_you_mean(str(given), ON_LOST)}"
        )


def check_count(given: Any, where: str) -> None:
    """Refuse what is no int of 1 or more; ``where`` is what the error calls it."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise LockMisuse(f"{where} must be an int of 1 or more, not {given!r}.")


def check_alias(alias: Any, where: str) -> None:
    """Refuse a name that is no alias of ``DATABASES``; ``where`` is what the error calls it."""
    if not django_settings.configured:
        return
    aliases = list(connections)
    if alias not in aliases:
        raise LockMisuse(
            f"{where} names {alias!r}, which is not in DATABASES.{did_you_mean(str(alias), aliases)}"
        )
