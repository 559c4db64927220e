"""Durations: seconds everywhere, milliseconds only at PostgreSQL's door."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from enum import Enum
from typing import Any, Final, TypeAlias

from django.utils.dateparse import parse_duration

from celery_pglock.errors import LockMisuse


class _Unset(Enum):
    UNSET = "unset"

    def __repr__(self) -> str:
        return "<unset>"


UNSET: Final = _Unset.UNSET

Duration: TypeAlias = float | timedelta | None
"""Seconds; ``0`` does not wait, ``None`` waits for ever."""

MaybeDuration: TypeAlias = Duration | _Unset
MaybeSeconds: TypeAlias = float | _Unset | None

# lock_timeout is an int4 of milliseconds.
LONGEST_MILLISECONDS = 2**31 - 1

# As PostgreSQL's intervals know them, in seconds. Months and years have no fixed length.
UNITS = {
    "us": 1e-6,
    "microsecond": 1e-6,
    "ms": 1e-3,
    "millisecond": 1e-3,
    "s": 1,
    "sec": 1,
    "second": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "h": 3600,
    "hour": 3600,
    "d": 86400,
    "day": 86400,
    "w": 604800,
    "week": 604800,
}
QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)


def seconds(duration: Duration, name: str) -> float | None:
    """The duration in seconds, checked; ``name`` is what an error calls it."""
    if duration is None:
        return None
    if isinstance(duration, timedelta):
        duration = duration.total_seconds()
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise LockMisuse(f"{name} must be a number of seconds, a timedelta or None, not {duration!r}.")
    if math.isnan(duration) or duration < 0:
        raise LockMisuse(f"{name} must be 0 or more seconds, or None to wait for ever, not {duration!r}.")
    return float(duration)


def milliseconds(duration: float) -> int:
    """Seconds as PostgreSQL's settings want them; at least 1, because 0 would mean for ever."""
    if duration * 1000 >= LONGEST_MILLISECONDS:
        return LONGEST_MILLISECONDS
    # A float's own error is no millisecond: 2.007 * 1000 is more than 2007.
    return max(1, math.ceil(round(duration * 1000, 6)))


def interval(given: Any, name: str) -> timedelta:
    """A length of time as a timedelta; ``name`` is what an error calls it.

    A text is one or several numbers with units, ``"1 minute 30 seconds"`` or ``"90s"``, or what Django's
    ``parse_duration`` reads: ``"00:01:30"``, ``"PT1M30S"``.
    """
    if isinstance(given, timedelta):
        return given
    try:
        if isinstance(given, str):
            found = _quantities(given)
            if found is None and given.strip():
                found = parse_duration(given.strip())
            if found is not None:
                return found
        elif isinstance(given, int | float) and not isinstance(given, bool):
            return timedelta(seconds=given)
    except (ValueError, OverflowError):
        pass
    raise LockMisuse(f"{name} must be an interval such as '5 seconds' or '1 minute 30 s', not {given!r}.")


def _quantities(text: str) -> timedelta | None:
    total = 0.0
    position = 0
    while position < len(text):
        found = QUANTITY.match(text, position)
        if found is None:
            return None
        unit = found[2].lower()
        length = UNITS.get(unit) or UNITS.get(unit.removesuffix("s"))
        if length is None:
            return None
        total += float(found[1]) * length
        position = found.end()
    return timedelta(seconds=total) if text.strip() else None
