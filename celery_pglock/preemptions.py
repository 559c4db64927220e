"""What a task that was stopped for a critical one finds about it in the audit."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from django.db import DatabaseError, InterfaceError
from psycopg.errors import InsufficientPrivilege

from celery_pglock import labels
from celery_pglock.audits import OUTCOMES, TABLE
from celery_pglock.clocks import now
from celery_pglock.errors import LockLost
from celery_pglock.looks import FAILURES, apart

logger = logging.getLogger(__name__)

# Its outcome may not be written down yet when its victim looks.
NEWEST: Final = f"""
SELECT act.at, act.comes_back, act.by, act.reason FROM {TABLE} AS act
LEFT JOIN {OUTCOMES} AS outcome ON outcome.act_id = act.id
WHERE act.task_id = %s AND act.comes_back IS NOT NULL AND act.at > clock_timestamp() - %s
  AND coalesce(outcome.outcome, 'terminated') IN ('cancelled', 'terminated', 'still ending')
ORDER BY act.at DESC LIMIT 1
"""

# In how long a chain of errors a broken connection is looked for.
MOST_CAUSES = 20


@dataclass(frozen=True, slots=True)
class Preemption:
    """An act of the audit by which a task was stopped; ``comes_back`` says whether it is to run again."""

    at: datetime
    comes_back: bool
    by: str
    reason: str


def may_be_of_a_stop(error: BaseException) -> bool:
    """Whether an error could come of a backend that somebody stopped."""
    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None:
            break
        if isinstance(cause, DatabaseError | InterfaceError | LockLost):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def newest(task_id: str, aliases: Iterable[str], since: float) -> Preemption | None:
    """The newest act that stopped this task on one of these aliases, if there is one since then.

    ``since`` is on the clock that is never set: before, another run may have had this id, and been stopped.
    """
    name = labels.task_id_of(labels.application_name(labels.LOCK_SESSION, task_id))
    acts = [act for alias in aliases if (act := _newest(name, alias, since))]
    return max(acts, key=lambda act: act.at, default=None)


def _newest(name: str, alias: str, since: float) -> Preemption | None:
    try:
        with apart(alias) as connection, connection.cursor() as cursor:
            cursor.execute(NEWEST, [name, timedelta(seconds=now() - since)])
            row = cursor.fetchone()
    except FAILURES as error:
        # Without the app there is no audit; and with a database that is away nobody was stopped for another.
        is_forbidden = isinstance(error.__cause__, InsufficientPrivilege)
        logger.log(
            logging.WARNING if is_forbidden else logging.INFO,
            "Whether task %s was stopped for a critical one could not be read%s: %s",
            name,
            f" (GRANT SELECT ON {TABLE}, {OUTCOMES} lets it)" if is_forbidden else "",
            error,
        )
        return None
    return row and Preemption(*row)
