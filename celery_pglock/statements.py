"""The SQL statements that take advisory locks and give them back, one round trip each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple

from celery_pglock.durations import UNSET, MaybeSeconds, milliseconds
from celery_pglock.keys import INT8, Key

# The rest of what one statement may wait, however many keys it has waited for already.
REMAINING_TIMEOUT = (
    "set_config('lock_timeout', greatest(1, %s - floor(1000 * extract("
    "epoch FROM clock_timestamp() - statement_timestamp())))::bigint::text, true)"
)
WHOLE_TIMEOUT = "set_config('lock_timeout', %s::int::text, true)"

# How long the server took for what stands before it in the statement, in seconds.
# extract() would go by way of numeric.
ELAPSED = "date_part('epoch', clock_timestamp() - statement_timestamp())"

# Stands for any timeout that ends.
SOME_SECONDS: Final = 1.0

# Of a shape, which is the same for all keys: a project has few, and those of many keys are long.
MOST_SHAPES = 64


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


@dataclass(slots=True)
class _Shape:
    """A statement for any keys in these of the two key spaces, one for each position."""

    spaces: Sequence[int]
    columns: tuple[str, ...] = ()
    source: str = ""
    asks_for: list[int | None] = field(default_factory=list)
    """Of which position's key the next parameters are; ``None`` for the timeout in milliseconds."""

    def call(self, function: str, position: int) -> str:
        self.asks_for.append(position)
        return f"{function}(%s::bigint)" if self.spaces[position] == INT8 else f"{function}(%s::int, %s::int)"

    def having(self, sql: str) -> str:
        self.asks_for.append(None)
        return sql

    def of(self, keys: Sequence[Key], timeout: float = 0) -> Statement:
        parameters: list[int] = []
        for position in self.asks_for:
            parameters += (milliseconds(timeout),) if position is None else keys[position].arguments
        return Statement(self.columns, tuple(parameters), self.source)


def _spaces(keys: Sequence[Key]) -> tuple[int, ...]:
    return tuple([key.objsubid for key in keys])


def _function(name: str, *, shared: bool, xact: bool = False) -> str:
    return f"pg_{name.replace('lock', 'xact_lock') if xact else name}{'_shared' if shared else ''}"


def take_at_once(keys: Sequence[Key], *, shared: bool, xact: bool) -> Statement:
    """Take all the keys in this order without waiting; answers whether it took them.

    What was gained before a busy key is given back in the same statement, in reverse. A
    transaction-level lock cannot be given back: its partial gains end with the savepoint around it.
    """
    return _taking_at_once(_spaces(keys), shared=shared, xact=xact).of(keys)


@lru_cache(MOST_SHAPES)
def _taking_at_once(spaces: Sequence[int], *, shared: bool, xact: bool) -> _Shape:
    shape = _Shape(spaces)
    take = _function("try_advisory_lock", shared=shared, xact=xact)
    unlock = _function("advisory_unlock", shared=shared)

    def rest(position: int) -> str:
        taken = shape.call(take, position)
        if position == len(spaces) - 1:
            return taken
        others = rest(position + 1)
        if xact:
            return f"CASE WHEN {taken} THEN {others} ELSE false END"
        # IS NULL makes a false of the answer without PostgreSQL folding the call away.
        undo = f"{shape.call(unlock, position)} IS NULL"
        return f"CASE WHEN {taken} THEN CASE WHEN {others} THEN true ELSE {undo} END ELSE false END"

    shape.columns = (rest(0),)
    return shape


def take_slots(slots_by_key: Sequence[Sequence[Key]], *, xact: bool) -> Statement:
    """Take one free slot of every key without waiting; answers the slots' numbers, or NULL.

    All or nothing, as ``take_at_once``.
    """
    shape = _taking_slots(tuple([_spaces(slots) for slots in slots_by_key]), xact=xact)
    return shape.of([slot for slots in slots_by_key for slot in slots])


@lru_cache(MOST_SHAPES)
def _taking_slots(spaces_by_key: Sequence[Sequence[int]], *, xact: bool) -> _Shape:
    shape = _Shape([space for spaces in spaces_by_key for space in spaces])
    take = _function("try_advisory_lock", shared=False, xact=xact)

    def rest(key: int, first: int) -> str:
        if key == len(spaces_by_key):
            return "'{}'::int[]"
        slots = range(len(spaces_by_key[key]))
        undo = ""
        if not xact:
            calls = [f"WHEN {slot} THEN {shape.call('pg_advisory_unlock', first + slot)}" for slot in slots]
            undo = f" WHEN CASE slot {' '.join(calls)} END IS NULL THEN '{{}}'"
        tries = [f"WHEN {shape.call(take, first + slot)} THEN {slot}" for slot in slots]
        # OFFSET 0 keeps PostgreSQL from evaluating a subquery's calls more than once.
        return (
            f"(SELECT CASE WHEN others IS NOT NULL THEN slot || others WHEN slot IS NULL THEN NULL{undo} END"
            f" FROM (SELECT CASE {' '.join(tries)} END AS slot OFFSET 0) AS mine,"
            f" LATERAL (SELECT CASE WHEN slot IS NOT NULL THEN {rest(key + 1, first + len(slots))} END"
            f" AS others OFFSET 0) AS theirs)"
        )

    shape.columns = (rest(0, 0),)
    return shape


def take_waiting(keys: Sequence[Key], *, shared: bool, xact: bool, timeout: MaybeSeconds) -> Statement:
    """Take all the keys in this order, waiting at most ``timeout`` seconds over all of them.

    Unset keeps the ``lock_timeout`` in force. Running out is PostgreSQL's error 55P03. Within a
    transaction of somebody else's, the setting is put back as it was. Of a session-level lock the column
    before the answer tells how long the server took, in seconds.
    """
    if isinstance(timeout, float | int):
        return _taking_waiting(_spaces(keys), SOME_SECONDS, shared=shared, xact=xact).of(keys, timeout)
    return _taking_waiting(_spaces(keys), timeout, shared=shared, xact=xact).of(keys)


@lru_cache(MOST_SHAPES)
def _taking_waiting(spaces: Sequence[int], timeout: MaybeSeconds, *, shared: bool, xact: bool) -> _Shape:
    shape = _Shape(spaces)
    lock = _function("advisory_lock", shared=shared, xact=xact)
    columns = []
    for position in range(len(spaces)):
        if timeout is SOME_SECONDS:
            columns.append(shape.having(REMAINING_TIMEOUT if position else WHOLE_TIMEOUT))
        elif timeout is None and not position:
            columns.append("set_config('lock_timeout', '0', true)")
        columns.append(shape.call(lock, position))
    if xact and timeout is not UNSET:
        columns.append("set_config('lock_timeout', before, true)")
        shape.source = " FROM (SELECT current_setting('lock_timeout') AS before OFFSET 0) AS settings"
    shape.columns = (*columns, "true") if xact else (*columns, ELAPSED, "true")
    return shape


def give_back(keys: Sequence[Key], *, shared: bool) -> Statement:
    """Give the keys back in reverse; answers whether the session had every one of them."""
    return _giving_back(_spaces(keys), shared=shared).of(keys)


@lru_cache(MOST_SHAPES)
def _giving_back(spaces: Sequence[int], *, shared: bool) -> _Shape:
    shape = _Shape(spaces)
    unlock = _function("advisory_unlock", shared=shared)
    answers = [shape.call(unlock, position) for position in reversed(range(len(spaces)))]
    # An array, because AND would skip the rest after the first false.
    shape.columns = (answers[0] if len(answers) == 1 else f"true = ALL (ARRAY[{', '.join(answers)}])",)
    return shape
