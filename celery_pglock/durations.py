"""Durations: seconds everywhere, milliseconds only at PostgreSQL's door."""

from __future__ import annotations

import math
from datetime import timedelta
from enum import Enum
from typing import Final, TypeAlias

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
