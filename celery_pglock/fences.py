"""Fencing tokens, and the rows in which strict locks keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from django.db.models import BooleanField, Expression

from celery_pglock.durations import milliseconds
from celery_pglock.keys import Key
from celery_pglock.statements import Statement

TABLE = "celery_pglock_keystate"
SEQUENCE = "celery_pglock_token"

LONGEST_TASK_ID = 200

# A transaction in which a token guards shares the row of its key. It is waited for for so long: a fraction of
# the lease, so that the session is heard in time, and not for long in seconds.
ROW_TIMEOUT: Final = 0.2
LONGEST_ROW_TIMEOUT: Final = 1.0

RIGHTS = f"SELECT, INSERT, UPDATE ON {TABLE}, USAGE ON SEQUENCE {SEQUENCE}"

# NULL where there is no table.
MAY_KEEP_TOKENS = f"""
SELECT has_table_privilege(keys, 'SELECT') AND has_table_privilege(keys, 'INSERT')
   AND has_table_privilege(keys, 'UPDATE') AND has_sequence_privilege(tokens, 'USAGE')
FROM (SELECT to_regclass('{TABLE}')::oid AS keys, to_regclass('{SEQUENCE}')::oid AS tokens) AS found
"""

# Evaluated step by step, each from the one before: the locks, the token, the rows.
TAKE = f"""
WITH taken ({{names}}) AS MATERIALIZED (SELECT {{select}}),
keys AS MATERIALIZED (
    SELECT * FROM unnest(%s::int[], %s::bigint[], %s::bigint[]) AS keys (objsubid, classid, objid)
),
token AS MATERIALIZED (
    SELECT nextval('{SEQUENCE}') AS number,
           greatest(
               ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint,
               (SELECT max(timeline) FROM {TABLE} JOIN keys USING (objsubid, classid, objid))
           ) AS timeline,
           set_config('lock_timeout', %s, true) AS bounded
    FROM taken WHERE answer
),
state AS (
    INSERT INTO {TABLE} AS before (
        objsubid, classid, objid, timeline, number, lease, task_id,
        is_clean, was_clean, was_lease, was_task_id
    )
    SELECT keys.*, timeline, number, %s, %s, false, true, 0, ''
    FROM token CROSS JOIN keys WHERE bounded IS NOT NULL
    ON CONFLICT (objsubid, classid, objid) DO UPDATE SET
        timeline = excluded.timeline, number = excluded.number, task_id = excluded.task_id, is_clean = false,
        lease = CASE WHEN before.is_clean THEN excluded.lease ELSE greatest(before.lease, excluded.lease) END,
        was_clean = before.is_clean AND before.timeline = excluded.timeline,
        was_lease = before.lease, was_task_id = before.task_id
    RETURNING was_clean, was_lease, was_task_id
)
"""

FOUND = """
FROM taken LEFT JOIN token ON true CROSS JOIN (
    SELECT coalesce(max(was_lease), 0)::float8 AS unclean_lease, coalesce(max(was_task_id), '') AS left_by
    FROM state WHERE NOT was_clean
) AS found
"""

GIVE_BACK = f"""
WITH bounded AS MATERIALIZED (SELECT set_config('lock_timeout', %s, true) AS bounded),
cleaned AS (
    UPDATE {TABLE} AS state SET is_clean = true
    FROM bounded, unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
         AS mine (objsubid, classid, objid, timeline, number)
    WHERE (state.objsubid, state.classid, state.objid, state.timeline, state.number)
          = (mine.objsubid, mine.classid, mine.objid, mine.timeline, mine.number) AND bounded IS NOT NULL
    RETURNING 1
)
"""

IS_NEWEST = f"""
(SELECT count(*) FROM (
    SELECT 1 FROM {TABLE}
    WHERE (objsubid, classid, objid, timeline, number) IN (
        SELECT * FROM unnest(%s::int[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
    )
    FOR SHARE
) AS held) = %s
"""


class Token(NamedTuple):
    """A fencing token: a later holder of a key has a higher one, over restarts and failovers."""

    timeline: int
    number: int


@dataclass(frozen=True, slots=True)
class Handover:
    """What the rows tell a new holder.

    ``unclean_lease`` is the lease in seconds of a holder before that did not leave in order, and may not have
    given up yet; 0 if there is none. ``left_by`` is its task's id.
    """

    token: Token
    unclean_lease: float
    left_by: str


def take(taking: Statement, keys: Sequence[Key], task_id: str, lease: float) -> Statement:
    """Take as this statement does, and write the rows of these keys in the same."""
    names = [f"column_{number}" for number in range(len(taking.columns) - 1)]
    return Statement(
        opening=TAKE.format(names=", ".join([*names, "answer"]), select=taking.select),
        opening_parameters=(
            *taking.parameters,
            *_columns(keys),
            str(milliseconds(row_timeout(lease))),
            lease,
            task_id[:LONGEST_TASK_ID],
        ),
        columns=("timeline", "number", "unclean_lease", "left_by", *names[-1:], "answer"),
        source=FOUND,
    )


def handover(row: Sequence[Any]) -> Handover:
    """What the columns of ``take()`` tell, where it took."""
    timeline, number, unclean_lease, left_by = row[:4]
    return Handover(Token(timeline, number), unclean_lease, left_by)


def give_back(giving: Statement, tokens: Mapping[Key, Token], lease: float) -> Statement:
    """Note in the rows that their holder leaves in order, and only then give back as this statement does."""
    return Statement(
        opening=GIVE_BACK,
        opening_parameters=(str(milliseconds(row_timeout(lease))), *_columns_with_tokens(tokens)),
        columns=giving.columns,
        source=" FROM (SELECT count(*) FROM cleaned) AS cleaned",
        parameters=giving.parameters,
    )


def row_timeout(lease: float) -> float:
    """How many seconds a row is waited for, which somebody's open transaction may share."""
    return min(ROW_TIMEOUT * lease, LONGEST_ROW_TIMEOUT)


class IsNewest(Expression):
    """Whether tokens are the newest of their keys; no newer one is given out before the transaction ends.

    A condition for ``filter()``. The rows have to be in the database of the query.
    """

    output_field = BooleanField()
    conditional = True

    def __init__(self, tokens: Mapping[Key, Token]) -> None:
        super().__init__()
        self.tokens = dict(tokens)

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        return IS_NEWEST, (*_columns_with_tokens(self.tokens), len(self.tokens))


def _columns(keys: Iterable[Key]) -> list[list[int]]:
    numbers = [(key.objsubid, key.classid, key.objid) for key in keys]
    return [list(column) for column in zip(*numbers, strict=True)]


def _columns_with_tokens(tokens: Mapping[Key, Token]) -> list[list[int]]:
    return [
        *_columns(tokens),
        [token.timeline for token in tokens.values()],
        [token.number for token in tokens.values()],
    ]
