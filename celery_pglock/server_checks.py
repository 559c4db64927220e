"""What can be found wrong with the locks of tasks by asking their server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from django.core.checks import CheckMessage
from django.db import DatabaseError, connections

from celery_pglock import config, labels
from celery_pglock.errors import LockMisuse
from celery_pglock.findings import error, warning
from celery_pglock.raw_connections import OnStandby, check_vendor
from celery_pglock.schedules import entries_of_ours
from celery_pglock.sessions import check_alias
from celery_pglock.task_options import Locked, aliases_of, is_ours, time_limit_of_its_own

# Transaction-level locks live under the timeouts of the work connection. In milliseconds; 0 is none.
TIMEOUTS = """
SELECT name, setting::float8 / 1000 FROM pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout') AND setting::float8 > 0 ORDER BY name DESC
"""

# The roles of others whose tasks use this database, as far as their sessions or our settings name them.
# What a role may is decided as in pg_signal_backend() and pg_stat_get_activity() of PostgreSQL's source,
# whose views do not hide application_name.
OTHER_ROLES = """
SELECT role.rolname,
    own.rolsuper OR pg_has_role(role.oid, 'USAGE') OR pg_has_role('pg_read_all_stats', 'USAGE'),
    own.rolsuper OR NOT role.rolsuper AND (
        pg_has_role(role.oid, 'USAGE')
        OR pg_has_role('pg_signal_backend', 'USAGE') AND pg_has_role('pg_read_all_stats', 'USAGE')
    )
FROM pg_roles AS role JOIN pg_roles AS own ON own.rolname = current_user
WHERE role.oid <> own.oid AND (
    role.rolname = ANY(%s)
    OR role.oid IN (
        SELECT usesysid FROM pg_stat_activity
        WHERE datname = current_database() AND application_name ~ %s
    )
)
ORDER BY 1
"""

NAMES_OF_OURS = f"^({labels.WORK_CONNECTION}:|{labels.LOCK_SESSION}(:|$))"

PRIORITIZE = "celery_pglock.prioritize_critical_tasks"


def findings(app: Any, locked: Sequence[Locked], alias: str) -> Iterator[CheckMessage]:
    """What is wrong with this alias for the tasks that lock through it; connects only if there are any."""
    if not config.current().ENABLED:
        return
    here = [one for one in locked if one[1].alias() == alias and not is_ours(one[0].name)]
    clears = alias in _aliases_that_are_cleared(app, locked)
    if not here and not (clears and connections[alias].vendor == "postgresql"):
        return
    strict = aliases_of(options for _, options in here).get(alias)
    try:
        try:
            check_vendor(alias)
            if strict is not None:
                # Not whether strict locks have their table: `migrate`, which makes it, checks first.
                check_alias(alias, strict=False)
        except (LockMisuse, OnStandby) as failure:
            yield _excludes_nobody(alias, failure)
            return
        if strict:
            yield from _strict_locks(alias)
        yield from _transactions([one for one in here if one[1].xact], alias)
        yield from _rights(locked, alias, clears=clears, locks=bool(here))
    except DatabaseError as failure:
        yield _not_checked(alias, failure)


def _where(alias: str) -> str:
    return f"DATABASES[{alias!r}]"


def _not_checked(alias: str, failure: DatabaseError) -> CheckMessage:
    return warning(
        "W001",
        f"Could not check whether locks through it exclude: {str(failure).strip()}",
        hint="Check again when the server answers. Each lock session is checked when it is opened.",
        obj=_where(alias),
    )


def _excludes_nobody(alias: str, failure: Exception) -> CheckMessage:
    return error(
        "E003",
        str(failure),
        hint="Name an alias that leads to the primary directly: CELERY_PGLOCK['USING'], lock_using.",
        obj=_where(alias),
    )


def _strict_locks(alias: str) -> Iterator[CheckMessage]:
    try:
        check_alias(alias, strict=True)
    except LockMisuse as misuse:
        yield warning(
            "W010",
            str(misuse),
            hint="Workers do not start before that is mended.",
            obj=_where(alias),
        )


def _transactions(locked: Sequence[Locked], alias: str) -> Iterator[CheckMessage]:
    """What ends a transaction-level lock, or the wait for it, before the task's own options do."""
    if not any(options.wait() or time_limit_of_its_own(task) for task, options in locked):
        return
    for timeout, after in _asked(alias, TIMEOUTS):
        for task, options in locked:
            wait, limit = options.wait() or 0, time_limit_of_its_own(task)
            is_of_all = timeout == "transaction_timeout"
            # With several slots it polls: each statement is short.
            if wait > after and (is_of_all or options.limit == 1):
                what = f"its wait for the lock, which may last {wait:g} s (lock_timeout)"
            elif is_of_all and limit > after:
                what = f"its body with all its work, which may last {limit:g} s (time_limit)"
            else:
                continue
            yield warning(
                "W004",
                f"Task {task.name} holds its lock in a transaction (lock_xact): after {after:g} s {timeout} "
                f"of {_where(alias)} ends {what}.",
                hint=f"Lower what the task may take, raise {timeout}, or leave out lock_xact.",
                obj=task.name,
            )


def _aliases_that_are_cleared(app: Any, locked: Iterable[Locked]) -> set[str]:
    """Where somebody is to be stopped for a critical task, as far as beat or the tasks tell."""
    default = config.current().USING
    scheduled = {using or default for _, name, using in entries_of_ours(app) if name == PRIORITIZE}
    return scheduled | ({default} if any(options.priority for _, options in locked) else set())


def _rights(locked: Iterable[Locked], alias: str, *, clears: bool, locks: bool) -> Iterator[CheckMessage]:
    users = {
        connections[one].settings_dict["USER"]
        for one in {options.alias() for _, options in locked}
        if _database(one) == _database(alias)
    }
    roles = _asked(alias, OTHER_ROLES, sorted(users), NAMES_OF_OURS)
    hidden = ", ".join(role for role, is_seen, _ in roles if not is_seen)
    spared = ", ".join(role for role, _, is_stopped in roles if not is_stopped)
    if spared and clears:
        yield warning(
            "W008",
            f"Nobody who works as {spared} can be stopped for a critical task: the role of {_where(alias)} "
            f"may not.",
            hint=(
                "Make it a member of theirs, or GRANT pg_signal_backend, pg_read_all_stats TO it; nobody but "
                "a superuser stops a superuser."
            ),
            obj=_where(alias),
        )
    if hidden and locks:
        yield warning(
            "W009",
            f"Which task holds a lock is not seen where it works as {hidden}: the role of {_where(alias)} "
            f"may not read what their sessions say.",
            hint="Make it a member of theirs, or GRANT pg_read_all_stats TO it.",
            obj=_where(alias),
        )


def _database(alias: str) -> tuple[Any, ...]:
    settings = connections[alias].settings_dict
    return tuple(settings[name] for name in ("ENGINE", "HOST", "PORT", "NAME"))


def _asked(alias: str, sql: str, *parameters: Any) -> list[Any]:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())
