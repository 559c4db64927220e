"""What a measurement gives: tables, with their targets and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured, and on which servers."""

    is_quick: bool
    postgresql: str
    """The major version."""
    database_url: str
    redis_url: str

    def choose(self, *, full: T, quick: T) -> T:
        return quick if self.is_quick else full


@dataclass(frozen=True)
class Target:
    """What must be shown: a figure of at most, or with ``at_least`` of at least, this bound."""

    what: str
    measured: float
    bound: float
    unit: str = ""
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True)
class Bars:
    """A chart of some columns, whose figures are drawn as bars beside the labels of the first column."""

    values: Sequence[str]


@dataclass(frozen=True)
class Lines:
    """A chart of some columns over another; both axes may be logarithmic."""

    over: str
    values: Sequence[str]
    logarithmic: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of what was measured.

    name:
        Names the chart's file: lower case, digits, hyphens.
    rows:
        As many cells as columns. Text is printed as it is, a float with three significant digits, ``None``
        as a dash.
    note:
        What a reader must know to read it; Markdown.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]
    note: str = ""
    targets: Sequence[Target] = ()
    chart: Bars | Lines | None = None

    def column(self, name: str) -> list[str | float | int | None]:
        return [row[list(self.columns).index(name)] for row in self.rows]


def cell(value: str | float | int | None) -> str:
    """A value as a reader sees it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
