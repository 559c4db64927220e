"""Rounds in which contenders take turns, so that whatever the machine does meets them all alike."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# The first operations of a contender tell how many make a turn.
FIRST_OPERATIONS = 20


class ContenderFailed(Exception):
    """A contender cannot do what it is measured for; says why."""


@dataclass(frozen=True)
class Quartiles:
    """The median of one figure per round, and the quartiles, between which half of the rounds lie."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Quartiles:
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        return cls(*statistics.quantiles(figures, n=4, method="inclusive"))

    @property
    def spread(self) -> str:
        return f"{self.lower:.3g}-{self.upper:.3g}"


@dataclass(frozen=True)
class Rounds:
    """Mean seconds per operation by contender, one for each round; and why others have none."""

    means: Mapping[str, Sequence[float]]
    failures: Mapping[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> Quartiles:
        return Quartiles.of(self._of(name))

    def ratio(self, name: str, to: str, *, minus: str | None = None) -> Quartiles:
        """How many times the other's time, round by round; only what it takes over ``minus``, if named."""
        mine = self._of(name)
        less = self._of(minus) if minus else [0.0] * len(mine)
        rounds = zip(mine, less, self._of(to), strict=True)
        return Quartiles.of([(own - without) / theirs for own, without, theirs in rounds])

    def has(self, name: str) -> bool:
        return name in self.means

    def _of(self, name: str) -> Sequence[float]:
        if name in self.failures:
            raise ContenderFailed(f"{name}: {self.failures[name]}")
        return self.means[name]


def interleaved(
    contenders: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    seconds: float = 0.0,
    operations: int = 0,
) -> Rounds:
    """Let each contender have one turn per round, in an order that changes; warm-up comes first.

    contenders:
        Called with a number of operations, each answers with the seconds they took; one that raises
        ``ContenderFailed`` is out.
    seconds, operations:
        How long a turn is: about so many seconds, or exactly so many operations.
    """
    turns: dict[str, int] = {}
    means: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for name, contender in contenders.items():
        try:
            turns[name] = operations or _operations_within(contender, seconds)
            contender(turns[name])
            means[name] = []
        except ContenderFailed as failure:
            failures[name] = str(failure)
    order = random.Random(0)  # the same in every run
    for _ in range(rounds):
        for name in order.sample(sorted(means), len(means)):
            try:
                means[name].append(contenders[name](turns[name]) / turns[name])
            except ContenderFailed as failure:
                failures[name] = str(failure)
                del means[name]
    return Rounds(means, failures)


def _operations_within(contender: Callable[[int], float], seconds: float) -> int:
    contender(FIRST_OPERATIONS)
    mean = contender(FIRST_OPERATIONS) / FIRST_OPERATIONS
    return max(5, round(seconds / max(mean, 1e-7)))
