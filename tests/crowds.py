"""Two hundred sessions that hold ten thousand locks, with fifty that wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from celery_pglock import labels
from celery_pglock.keys import Key, key
from celery_pglock.labels import Holding, Owner
from celery_pglock.markers import marker
from tests.bystanders import Bystander, bystanders

STALLS = 49

# Whoever locks the table locks all its partitions.
BUILD = f"""
CREATE TABLE market (id int, price int NOT NULL) PARTITION BY RANGE (id);
DO $$
BEGIN
    FOR stall IN 1..{STALLS} LOOP
        EXECUTE format(
            'CREATE TABLE market_%s PARTITION OF market FOR VALUES FROM (%s) TO (%s)', stall, stall, stall + 1
        );
    END LOOP;
END $$;
INSERT INTO market SELECT id, 0 FROM generate_series(1, {STALLS}) AS id;
"""
PULL_DOWN = "DROP TABLE market"

Make = Callable[..., Bystander]


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who is in it: each of the chain waits for the one before, and the last of the queue is critical."""

    tasks: list[Bystander]
    strangers: list[Bystander]
    clerks: list[Bystander]
    queue: list[Bystander]
    chain: list[Bystander]
    for_table: list[Bystander]
    for_row: list[Bystander]


@contextmanager
def crowd(alias: str) -> Iterator[Crowd]:
    """They stay for the block. What they lock apart from advisory locks is a table of their own."""
    with bystanders(alias) as make:
        builder = make()
        builder.does(BUILD)
        try:
            with bystanders(alias) as make:
                yield _gathered(make)
        finally:
            builder.does(PULL_DOWN)


def _gathered(make: Make) -> Crowd:
    tasks = [_task(make, [f"sale:{number}:{item}" for item in range(42)]) for number in range(100)]
    strangers = [_stranger(make, range(64 * number, 64 * (number + 1))) for number in range(60)]
    clerks = [_clerk(make, stall) for stall in range(1, 41)]

    queue = [_task(make) for _ in range(20)]
    queue[-1].take(marker(1), shared=True)
    for waiter in queue:
        _wait_for_key(waiter, "sale:0:0")
    chain = [_task(make, [f"link:{number}"]) for number in range(11)]
    for number, waiter in enumerate(chain[1:]):
        _wait_for_key(waiter, f"link:{number}")
    for_table = [make(application_name="migrate") for _ in range(10)]
    for waiter in for_table:
        waiter.waits(f"BEGIN; LOCK TABLE market_{STALLS}")
    for_row = [make(application_name="web") for _ in range(10)]
    for waiter in for_row:
        waiter.waits(_change(1))
    return Crowd(tasks, strangers, clerks, queue, chain, for_table, for_row)


def _task(make: Make, names: Iterable[str] = ()) -> Bystander:
    """The lock session of a task with these keys."""
    somebody = make(application_name=labels.application_name(labels.LOCK_SESSION, str(uuid4())))
    somebody.does(_labelled(somebody, [key(name) for name in names]))
    return somebody


def _stranger(make: Make, numbers: Iterable[int]) -> Bystander:
    somebody = make(application_name="psql")
    somebody.does(_take(key(number) for number in numbers))
    return somebody


def _clerk(make: Make, stall: int) -> Bystander:
    """An open transaction, which has locked the whole table and one row."""
    somebody = make(application_name="web")
    somebody.does("BEGIN", "LOCK TABLE market IN ROW SHARE MODE", _change(stall))
    return somebody


def _wait_for_key(waiter: Bystander, name: str) -> None:
    waiter.waits(_labelled(waiter, [key(name)]))


def _labelled(somebody: Bystander, keys: list[Key]) -> str:
    task_id = labels.task_id_of(somebody.connection.info.parameter_status("application_name") or "")
    holdings = [Holding(one, 1_700_000_000.0) for one in keys]
    label = labels.comment(Owner("shop.sell", task_id, "celery@shop-1"), holdings, show_names=True)
    return f"{label} {_take(keys)}"


def _take(keys: Iterable[Key]) -> str:
    numbers = ", ".join(str(one.arguments[0]) for one in keys)
    return f"SELECT count(pg_advisory_lock(number)) FROM unnest(ARRAY[{numbers}]::bigint[]) AS number"


def _change(stall: int) -> str:
    return f"UPDATE market SET price = price + 1 WHERE id = {stall}"
