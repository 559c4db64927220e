"""Lines over time, in the numbers that an SVG is drawn with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median

from django.utils import timezone

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 32, 12, 28
TICKS = 4
# Between points that are further apart than usual nobody knows what was.
GAP = 3


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis, in units of the drawing."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series as the data of an SVG path; ``most`` is its highest value, ``None`` if it has none."""

    name: str
    path: str
    most: int | None


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of ``WIDTH`` by ``HEIGHT``."""

    lines: tuple[Line, ...]
    times: tuple[Tick, ...]
    values: tuple[Tick, ...]

    width = WIDTH
    height = HEIGHT
    left = LEFT
    right = WIDTH - RIGHT
    top = TOP
    bottom = HEIGHT - BOTTOM

    @property
    def summary(self) -> str:
        """The highest values in words, for who does not see it."""
        return ", ".join(
            f"at most {line.most} {line.name}" if line.most is not None else f"no {line.name} known"
            for line in self.lines
        )


def chart(
    names: Sequence[str],
    points: Iterable[tuple[datetime, Sequence[int | None]]],
    begin: datetime,
    end: datetime,
) -> Chart:
    """A line for each name; ``points`` have a value for each of them, in order of time."""
    found = [(at, values) for at, values in points if begin <= at <= end]
    highest = max((value for _, values in found for value in values if value is not None), default=0)
    top = _round_up(highest)
    gap = _gap([at for at, _ in found])
    lines = []
    for number, name in enumerate(names):
        series = [(at, values[number]) for at, values in found]
        known = [value for _, value in series if value is not None]
        path = []
        last: datetime | None = None
        for at, value in series:
            if value is None:
                last = None
                continue
            x, y = _x(at, begin, end), _y(value, top)
            if last is None or (gap is not None and at - last > gap):
                # A line to itself is a dot, where its ends are round.
                path.append(f"M{x:.1f} {y:.1f}")
            path.append(f"L{x:.1f} {y:.1f}")
            last = at
        lines.append(Line(name, "".join(path), max(known, default=None)))
    step = (end - begin) / TICKS
    shown = "%H:%M" if end - begin <= timedelta(days=1) else "%d %b"
    times = [begin + step * number for number in range(TICKS + 1)]
    return Chart(
        tuple(lines),
        tuple(Tick(round(_x(at, begin, end), 1), _local(at).strftime(shown)) for at in times),
        tuple(Tick(round(_y(value, top), 1), str(value)) for value in (0, top // 2, top)),
    )


def _local(at: datetime) -> datetime:
    return timezone.localtime(at) if timezone.is_aware(at) else at


def _x(at: datetime, begin: datetime, end: datetime) -> float:
    share: float = (at - begin) / (end - begin)
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(value: int, top: int) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _gap(times: Sequence[datetime]) -> timedelta | None:
    steps = [(after - before).total_seconds() for before, after in pairwise(times)]
    return timedelta(seconds=GAP * median(steps)) if steps else None


def _round_up(value: int) -> int:
    """The next of 2, 4, 10, 20, 40, 100, …"""
    power = 1
    while True:
        for factor in (2, 4, 10):
            if factor * power >= value:
                return factor * power
        power *= 10
