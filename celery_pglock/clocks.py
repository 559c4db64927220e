"""The clock by which silence is measured."""

from __future__ import annotations

import time

# Linux's CLOCK_MONOTONIC stands still while the machine is suspended, and the server's clock does not.
# macOS's goes on.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds on a clock that is never set, and counts the time in which the machine was suspended."""
    return time.clock_gettime(_CLOCK)
