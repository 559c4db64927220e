"""Fencing tokens, and the rows in which strict locks keep them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from django.db.models import BooleanField, Expression

from celery_pglock.durations import milliseconds
from celery_pglock.keys import Key
from celery_pglock.statements import Statement

TABLE = "celery_pglock_keystate"
SEQUENCE = "celery_pglock_token"

LONGEST_TASK_ID = 200

# The next holder waits for writes that the last one's token guards, and who gives back for its own that are
# still open: in fractions of the lease, so that the session is heard in time.
TAKE_TIMEOUT: Final = 0.2
LONGEST_GIVE_BACK_TIMEOUT: Final = 1.0

# Evaluated step by step, each from the one before: the locks, the token, the rows.
TAKE = f"""
WITH taken ({{names}}) AS MATERIALIZED (SELECT {{select}}),
token AS MATERIALIZED (
    SELECT nextval('{SEQUENCE}') AS number,
           ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint AS timeline,
           set_config('lock_timeout', %s, true) AS bounded
    FROM taken WHERE answer
),
state AS (
    INSERT INTO {TABLE} AS before (
        objsubid, classid, objid, timeline, number, lease, task_id,
        is_clean, was_clean, was_lease, was_task_id
    )
    SELECT keys.*, timeline, number, %s, %s, false, true, 0, ''
    FROM token CROSS JOIN unnest(%s::int[], %s::bigint[], %s::bigint[]) AS keys
    WHERE bounded IS NOT NULL
    ON CONFLICT (objsubid, classid, objid) DO UPDATE SET
        timeline = excluded.timeline, number = excluded.number, lease = excluded.lease,
        task_id = excluded.task_id, is_clean = false,
        was_clean = before.is_clean, was_lease = before.lease, was_task_id = before.task_id
    RETURNING was_clean, was_lease, was_task_id
)
"""

FOUND = """
FROM taken LEFT JOIN token ON true CROSS JOIN (
    SELECT coalesce(max(was_lease), 0) AS unclean_lease, coalesce(max(was_task_id), '') AS left_by
    FROM state WHERE NOT was_clean
) AS found
"""

GIVE_BACK = f"""
WITH bounded AS MATERIALIZED (SELECT set_config('lock_timeout', %s, true) AS bounded),
cleaned AS (
    UPDATE {TABLE} AS state SET is_clean = true
    FROM bounded, unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[])
         AS mine (objsubid, classid, objid, number)
    WHERE (state.objsubid, state.classid, state.objid, state.number)
          = (mine.objsubid, mine.classid, mine.objid, mine.number) AND bounded IS NOT NULL
    RETURNING 1
)
"""

IS_NEWEST = f"""
(SELECT count(*) FROM (
    SELECT 1 FROM {TABLE}
    WHERE (objsubid, classid, objid) IN (SELECT * FROM unnest(%s::int[], %s::bigint[], %s::bigint[]))
      AND (timeline, number) = (%s, %s)
    FOR SHARE
) AS held) = %s
"""


class Token(NamedTuple):
    """A fencing token: a later holder of a key has a higher one, over restarts and failovers."""

    timeline: int
    number: int


class Handover(NamedTuple):
    """What the rows tell a new holder: its token, and the lease of a holder that did not leave in order."""

    token: Token
    unclean_lease: float
    left_by: str


def take(taking: Statement, keys: Sequence[Key], task_id: str, lease: float) -> Statement:
    """Take as this statement does and write the rows in the same; its last columns make a handover."""
    names = [f"column_{number}" for number in range(len(taking.columns) - 1)]
    statement = Statement(opening=TAKE.format(names=", ".join([*names, "answer"]), select=taking.select))
    statement.opening_parameters = [*taking.parameters, str(milliseconds(TAKE_TIMEOUT * lease))]
    statement.opening_parameters += [lease, task_id[:LONGEST_TASK_ID], *_columns(keys)]
    statement.columns = ["timeline", "number", "unclean_lease", "left_by", *names[-1:], "answer"]
    statement.source = FOUND
    return statement


def give_back(giving: Statement, tokens: Sequence[tuple[Key, Token]], lease: float) -> Statement:
    """Note in the rows that their holder leaves in order, and only then give back as this statement does."""
    numbers = [token.number for _, token in tokens]
    return Statement(
        opening=GIVE_BACK,
        opening_parameters=[
            str(milliseconds(min(TAKE_TIMEOUT * lease, LONGEST_GIVE_BACK_TIMEOUT))),
            *_columns([key for key, _ in tokens]),
            numbers,
        ],
        columns=giving.columns,
        source=" FROM (SELECT count(*) FROM cleaned) AS cleaned",
        parameters=giving.parameters,
    )


class IsNewest(Expression):
    """Whether a token is still the newest of its keys; no newer one is given out until the transaction ends.

    A condition for ``filter()``. The rows have to be in the database of the query.
    """

    output_field = BooleanField()
    conditional = True

    def __init__(self, keys: Sequence[Key], token: Token) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.token = token

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        return IS_NEWEST, (*_columns(self.keys), *self.token, len(self.keys))


def _columns(keys: Sequence[Key]) -> list[list[int]]:
    return [[key.objsubid for key in keys], [key.classid for key in keys], [key.objid for key in keys]]
