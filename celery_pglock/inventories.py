"""What a lock session holds, counted as its owner has taken it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence

from celery_pglock.fences import Token
from celery_pglock.keys import Key
from celery_pglock.labels import Holding


class Inventory:
    """The keys that a session holds, in which mode, how often, and since when by our own clock.

    ``tokens`` are those of keys that were taken strictly.
    """

    def __init__(self) -> None:
        self.tokens: dict[Key, Token] = {}
        self._counts: dict[tuple[Key, bool], int] = {}
        self._since: dict[Key, float] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        # A copy, as the watcher asks while its owner may count.
        return names(key for key, _ in tuple(self._counts))

    @property
    def counts(self) -> Counter[tuple[Key, bool]]:
        """How often which key is held; with True for the shared mode."""
        return Counter(self._counts)

    def has(self, key: Key, *, shared: bool) -> bool:
        return (key, shared) in self._counts

    def has_all(self, keys: Iterable[Key]) -> bool:
        """Whether it has all of them, in whatever mode."""
        return {key for key, _ in self._counts}.issuperset(keys)

    def last_of(self, keys: Iterable[Key], *, shared: bool) -> tuple[Key, ...]:
        """Those of the keys that are gone once one acquisition of them is taken out."""
        return tuple([key for key in keys if self._counts[key, shared] == 1])

    def put_in(self, keys: Iterable[Key], *, shared: bool) -> None:
        now = time.time()
        for key in keys:
            counted = (key, shared)
            self._counts[counted] = self._counts.get(counted, 0) + 1
            self._since.setdefault(key, now)

    def take_out(self, keys: Iterable[Key], *, shared: bool) -> None:
        for key in keys:
            counted = (key, shared)
            left = self._counts.pop(counted) - 1
            if left:
                self._counts[counted] = left
            elif (key, not shared) not in self._counts:
                del self._since[key]

    def take_out_tokens(self, keys: Iterable[Key]) -> dict[Key, Token]:
        """The tokens of those of the keys that have one, which they lose."""
        return {key: self.tokens.pop(key) for key in keys if key in self.tokens} if self.tokens else {}

    def clear(self) -> None:
        self._counts.clear()
        self._since.clear()

    def holdings(self, fresh: Iterable[Key] = ()) -> list[Holding]:
        """What a label tells: all that it has, and ``fresh`` ones, which it asks for."""
        if not self._since:
            return [Holding(key, None) for key in fresh]
        told = {**self._since, **{key: None for key in fresh if key not in self._since}}
        return [Holding(key, since) for key, since in told.items()]

    def holdings_without(self, keys: Sequence[Key], *, shared: bool) -> list[Holding]:
        """What a label tells while these are given back, which are held once in this mode."""
        if len(keys) == len(self._counts):
            return []
        gone = {key for key in keys if (key, not shared) not in self._counts}
        return [holding for holding in self.holdings() if holding.key not in gone]


def names(keys: Iterable[Key]) -> str:
    """The names of keys, for a log."""
    return ", ".join(repr(key.name) for key in keys)
