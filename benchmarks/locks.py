"""What it costs to take a lock that is free, and to give it back."""

from __future__ import annotations

from benchmarks import cores
from benchmarks.contenders import contending, variables_of
from benchmarks.rounds import Rounds, interleaved
from benchmarks.tables import Bars, Scale, Table, Target

FLOOR = "floor: SELECT 1"
BY_HAND = "by hand, psycopg"
BY_HAND_WITH_TIMEOUT = "by hand, psycopg, with a timeout"
SESSION = "advisory, a value"
TIMEOUT = "advisory, timeout=5"
EIGHT_KEYS = "advisory, 8 keys"
TRANSACTION = "atomic(durable=True) with SELECT 1, no lock"
XACT = "the same in advisory, xact"

# What is done, by the function of lock_contenders that gives it.
CONTENDERS = {
    FLOOR: "floor",
    BY_HAND: "by_hand",
    BY_HAND_WITH_TIMEOUT: "by_hand_with_timeout",
    SESSION: "session",
    "advisory, built each time": "session_built_each_time",
    TIMEOUT: "timeout",
    "advisory, timeout=0": "without_waiting",
    "advisory, shared": "shared",
    EIGHT_KEYS: "eight_keys",
    "advisory, limit=3": "limit",
    "advisory, held already": "nested",
    TRANSACTION: "transaction",
    XACT: "xact",
    "the same in advisory, xact, timeout=5": "xact_with_timeout",
    "advisory, xact, nothing else": "empty_xact",
    "django-pglock": "django_pglock",
    "django-pglock, timeout=5": "django_pglock_with_timeout",
    "django-pglock, xact, with SELECT 1": "django_pglock_xact",
    "redis-py Lock": "redis_lock",
}

NOTE = """\
The floor is one prepared `SELECT 1` by a cursor of psycopg. By hand is what two prepared statements cost by
one cursor: one that takes, and one that gives back. *Floors* is the median over the rounds of the ratio to
the floor in the same round; half of the rounds are within the *spread*. *Hands* is the ratio to by hand."""


def measure(scale: Scale) -> list[Table]:
    targets = {name: f"benchmarks.lock_contenders:{function}" for name, function in CONTENDERS.items()}
    with cores.apart(scale) as is_apart, contending(targets, variables_of(scale)) as contenders:
        found = interleaved(
            contenders,
            rounds=scale.choose(full=41, quick=5),
            seconds=scale.choose(full=0.06, quick=0.02),
        )
    return [
        Table(
            name="locks",
            title="A free lock, taken and given back",
            columns=("what", "µs", "floors", "spread", "hands"),
            rows=[_row(found, name) for name in CONTENDERS],
            note=f"{NOTE}\n{cores.NOTE}" if is_apart else NOTE,
            targets=_targets(found),
            chart=Bars(["floors"]),
        )
    ]


def _row(found: Rounds, name: str) -> tuple[str | float | None, ...]:
    if not found.has(name):
        return (name, None, None, found.failures[name], None)
    ratio = found.ratio(name, FLOOR)
    by_hand = found.ratio(name, BY_HAND).median
    return (name, found.seconds(name).median * 1e6, ratio.median, ratio.spread, by_hand)


def _targets(found: Rounds) -> list[Target]:
    return [
        Target("a session lock, to the same by hand", found.ratio(SESSION, BY_HAND).median, 1.15),
        Target("with a timeout", found.ratio(TIMEOUT, BY_HAND_WITH_TIMEOUT).median, 1.15),
        Target(
            "a transaction-level lock, in floors over the transaction itself",
            found.ratio(XACT, FLOOR, minus=TRANSACTION).median,
            2.3,
        ),
        Target("8 keys at once, in floors", found.ratio(EIGHT_KEYS, FLOOR).median, 2.5),
    ]
