"""The SQL statements that take advisory locks and give them back, one round trip each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_pglock.durations import UNSET, MaybeSeconds, milliseconds
from celery_pglock.keys import INT8, Key

# The rest of what one statement may wait, however many keys it has waited for already.
REMAINING_TIMEOUT = (
    "set_config('lock_timeout', greatest(1, %s - floor(1000 * extract("
    "epoch FROM clock_timestamp() - statement_timestamp())))::bigint::text, true)"
)


# How long the server took for what stands before it in the statement, in seconds.
ELAPSED = "extract(epoch FROM clock_timestamp() - statement_timestamp())::float8"


@dataclass(slots=True)
class Statement:
    """The columns of a SELECT with their parameters; the last column of its one row is the answer."""

    columns: list[str] = field(default_factory=list)
    source: str = ""
    parameters: list[Any] = field(default_factory=list)
    opening: str = ""
    """What stands before the word SELECT, with parameters of its own."""
    opening_parameters: list[Any] = field(default_factory=list)

    @property
    def select(self) -> str:
        """What follows the word SELECT."""
        return f"{', '.join(self.columns)}{self.source}"

    def call(self, function: str, key: Key) -> str:
        self.parameters.extend(key.arguments)
        return f"{function}(%s::bigint)" if key.objsubid == INT8 else f"{function}(%s::int, %s::int)"

    def having(self, sql: str, *parameters: int) -> str:
        self.parameters.extend(parameters)
        return sql


def _function(name: str, *, shared: bool, xact: bool = False) -> str:
    return f"pg_{name.replace('lock', 'xact_lock') if xact else name}{'_shared' if shared else ''}"


def take_at_once(keys: Sequence[Key], *, shared: bool, xact: bool) -> Statement:
    """Take all the keys in this order without waiting; answers whether it took them.

    What was gained before a busy key is given back in the same statement, in reverse. A
    transaction-level lock cannot be given back: its partial gains end with the savepoint around it.
    """
    statement = Statement()
    take = _function("try_advisory_lock", shared=shared, xact=xact)
    unlock = _function("advisory_unlock", shared=shared)

    def rest(position: int) -> str:
        taken = statement.call(take, keys[position])
        if position == len(keys) - 1:
            return taken
        others = rest(position + 1)
        if xact:
            return f"CASE WHEN {taken} THEN {others} ELSE false END"
        # IS NULL makes a false of the answer without PostgreSQL folding the call away.
        undo = f"{statement.call(unlock, keys[position])} IS NULL"
        return f"CASE WHEN {taken} THEN CASE WHEN {others} THEN true ELSE {undo} END ELSE false END"

    statement.columns = [rest(0)]
    return statement


def take_slots(slots_by_key: Sequence[Sequence[Key]], *, xact: bool) -> Statement:
    """Take one free slot of every key without waiting; answers the slots' numbers, or NULL.

    All or nothing, as ``take_at_once``.
    """
    statement = Statement()
    take = _function("try_advisory_lock", shared=False, xact=xact)

    def rest(position: int) -> str:
        if position == len(slots_by_key):
            return "'{}'::int[]"
        slots = slots_by_key[position]
        undo = ""
        if not xact:
            calls = [
                f"WHEN {number} THEN {statement.call('pg_advisory_unlock', slot)}"
                for number, slot in enumerate(slots)
            ]
            undo = f" WHEN CASE slot {' '.join(calls)} END IS NULL THEN '{{}}'"
        tries = [f"WHEN {statement.call(take, slot)} THEN {number}" for number, slot in enumerate(slots)]
        # OFFSET 0 keeps PostgreSQL from evaluating a subquery's calls more than once.
        return (
            f"(SELECT CASE WHEN others IS NOT NULL THEN slot || others WHEN slot IS NULL THEN NULL{undo} END"
            f" FROM (SELECT CASE {' '.join(tries)} END AS slot OFFSET 0) AS mine,"
            f" LATERAL (SELECT CASE WHEN slot IS NOT NULL THEN {rest(position + 1)} END AS others OFFSET 0)"
            f" AS theirs)"
        )

    statement.columns = [rest(0)]
    return statement


def take_waiting(keys: Sequence[Key], *, shared: bool, xact: bool, timeout: MaybeSeconds) -> Statement:
    """Take all the keys in this order, waiting at most ``timeout`` seconds over all of them.

    Unset keeps the ``lock_timeout`` in force. Running out is PostgreSQL's error 55P03. Within a
    transaction of somebody else's, the setting is put back as it was. The column before the answer tells
    how long the server took, in seconds.
    """
    statement = Statement()
    lock = _function("advisory_lock", shared=shared, xact=xact)
    columns = statement.columns
    for position, key in enumerate(keys):
        if timeout is None and not position:
            columns.append("set_config('lock_timeout', '0', true)")
        elif isinstance(timeout, float):
            columns.append(statement.having(REMAINING_TIMEOUT, milliseconds(timeout)))
        columns.append(statement.call(lock, key))
    if xact and timeout is not UNSET:
        columns.append("set_config('lock_timeout', before, true)")
        statement.source = " FROM (SELECT current_setting('lock_timeout') AS before OFFSET 0) AS settings"
    columns += [ELAPSED, "true"]
    return statement


def give_back(keys: Sequence[Key], *, shared: bool) -> Statement:
    """Give the keys back in reverse; answers whether the session had every one of them."""
    statement = Statement()
    unlock = _function("advisory_unlock", shared=shared)
    # An array, because AND would skip the rest after the first false.
    answers = ", ".join(statement.call(unlock, key) for key in reversed(keys))
    statement.columns = [f"true = ALL (ARRAY[{answers}])"]
    return statement
