"""The SQL statements that take advisory locks and give them back, one round trip each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from celery_pglock.durations import UNSET, MaybeSeconds, milliseconds
from celery_pglock.keys import INT8, Key

# What one statement may wait, and the rest of that, however many keys it has waited for already.
WHOLE_TIMEOUT = "set_config('lock_timeout', %s::int::text, true)"
REMAINING_TIMEOUT = (
    "set_config('lock_timeout', greatest(1, %s - floor(1000 * extract("
    "epoch FROM clock_timestamp() - statement_timestamp())))::bigint::text, true)"
)


# Of the keys that come back: a statement is put together once for them.
MOST_STATEMENTS = 256


class Statement(NamedTuple):
    """The columns of a SELECT with their parameters; the last column of its one row is the answer."""

    columns: tuple[str, ...]
    parameters: tuple[Any, ...] = ()
    source: str = ""
    opening: str = ""
    """What stands before the word SELECT, with parameters of its own."""
    opening_parameters: tuple[Any, ...] = ()

    @property
    def select(self) -> str:
        """What follows the word SELECT."""
        return f"{', '.join(self.columns)}{self.source}"

    def after(self, column: str, *parameters: Any) -> Statement:
        """The statement, which does this first."""
        return Statement(
            (column, *self.columns),
            (*parameters, *self.parameters),
            self.source,
            self.opening,
            self.opening_parameters,
        )


class _Parameters(list[int]):
    """The parameters of a statement, in the order in which its text names them."""

    def call(self, function: str, key: Key) -> str:
        self.extend(key.arguments)
        return f"{function}(%s::bigint)" if key.objsubid == INT8 else f"{function}(%s::int, %s::int)"

    def having(self, sql: str, number: int) -> str:
        self.append(number)
        return sql


def _function(name: str, *, shared: bool, xact: bool = False) -> str:
    return f"pg_{name.replace('lock', 'xact_lock') if xact else name}{'_shared' if shared else ''}"


@lru_cache(MOST_STATEMENTS)
def take_at_once(keys: tuple[Key, ...], *, shared: bool, xact: bool) -> Statement:
    """Take all the keys in this order without waiting; answers whether it took them.

    What was gained before a busy key is given back in the same statement, in reverse. A
    transaction-level lock cannot be given back: its partial gains end with the savepoint around it.
    """
    parameters = _Parameters()
    take = _function("try_advisory_lock", shared=shared, xact=xact)
    unlock = _function("advisory_unlock", shared=shared)

    def rest(position: int) -> str:
        taken = parameters.call(take, keys[position])
        if position == len(keys) - 1:
            return taken
        others = rest(position + 1)
        if xact:
            return f"CASE WHEN {taken} THEN {others} ELSE false END"
        # IS NULL makes a false of the answer without PostgreSQL folding the call away.
        undo = f"{parameters.call(unlock, keys[position])} IS NULL"
        return f"CASE WHEN {taken} THEN CASE WHEN {others} THEN true ELSE {undo} END ELSE false END"

    return Statement((rest(0),), tuple(parameters))


@lru_cache(MOST_STATEMENTS)
def take_slots(slots_by_key: tuple[tuple[Key, ...], ...], *, xact: bool) -> Statement:
    """Take one free slot of every key without waiting; answers the slots' numbers, or NULL.

    All or nothing, as ``take_at_once``.
    """
    parameters = _Parameters()
    take = _function("try_advisory_lock", shared=False, xact=xact)

    def rest(position: int) -> str:
        if position == len(slots_by_key):
            return "'{}'::int[]"
        slots = slots_by_key[position]
        undo = ""
        if not xact:
            calls = [
                f"WHEN {number} THEN {parameters.call('pg_advisory_unlock', slot)}"
                for number, slot in enumerate(slots)
            ]
            undo = f" WHEN CASE slot {' '.join(calls)} END IS NULL THEN '{{}}'"
        tries = [f"WHEN {parameters.call(take, slot)} THEN {number}" for number, slot in enumerate(slots)]
        # OFFSET 0 keeps PostgreSQL from evaluating a subquery's calls more than once.
        return (
            f"(SELECT CASE WHEN others IS NOT NULL THEN slot || others WHEN slot IS NULL THEN NULL{undo} END"
            f" FROM (SELECT CASE {' '.join(tries)} END AS slot OFFSET 0) AS mine,"
            f" LATERAL (SELECT CASE WHEN slot IS NOT NULL THEN {rest(position + 1)} END AS others OFFSET 0)"
            f" AS theirs)"
        )

    return Statement((rest(0),), tuple(parameters))


@lru_cache(MOST_STATEMENTS)
def take_waiting(keys: tuple[Key, ...], *, shared: bool, xact: bool, timeout: MaybeSeconds) -> Statement:
    """Take all the keys in this order, waiting at most ``timeout`` seconds over all of them.

    Unset keeps the ``lock_timeout`` in force. Running out is PostgreSQL's error 55P03. Within a
    transaction of somebody else's, the setting is put back as it was.
    """
    parameters = _Parameters()
    lock = _function("advisory_lock", shared=shared, xact=xact)
    columns, source = [], ""
    for position, key in enumerate(keys):
        if timeout is None and not position:
            columns.append("set_config('lock_timeout', '0', true)")
        elif isinstance(timeout, float | int):
            limit = REMAINING_TIMEOUT if position else WHOLE_TIMEOUT
            columns.append(parameters.having(limit, milliseconds(timeout)))
        # Of a function that returns void: true.
        columns.append(f"{parameters.call(lock, key)} IS NOT NULL")
    if xact and timeout is not UNSET:
        columns.append("set_config('lock_timeout', before, true) IS NOT NULL")
        source = " FROM (SELECT current_setting('lock_timeout') AS before OFFSET 0) AS settings"
    return Statement(tuple(columns), tuple(parameters), source)


@lru_cache(MOST_STATEMENTS)
def give_back(keys: tuple[Key, ...], *, shared: bool) -> Statement:
    """Give the keys back in reverse; answers whether the session had every one of them."""
    parameters = _Parameters()
    unlock = _function("advisory_unlock", shared=shared)
    answers = [parameters.call(unlock, key) for key in reversed(keys)]
    # An array, because AND would skip the rest after the first false.
    answer = answers[0] if len(answers) == 1 else f"true = ALL (ARRAY[{', '.join(answers)}])"
    return Statement((answer,), tuple(parameters))
