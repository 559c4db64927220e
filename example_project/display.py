"""What a newcomer sees: lines on a terminal, or plain ones in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime

OK = "ok"
BROKEN = "BROKEN"

COLOURS = {
    "holds": "32",
    "frees": "2",
    "waits": "33",
    "retries": "35",
    "skips": "36",
    "fails": "31",
    "stopped": "31",
    "stops": "31",
    "reports": "34",
    OK: "32",
    BROKEN: "1;31",
}
IN_COLOUR = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if IN_COLOUR else text


def say(text: str = "") -> None:
    print(text, flush=True)


def happened(at: datetime, worker: str, call: str, verb: str, remark: str) -> None:
    """One line of what a worker does."""
    moment = f"{at.astimezone():%H:%M:%S}.{at.microsecond // 100_000}"
    say(f"{moment}  {worker:<8}  {call:<24}  {coloured(verb.ljust(7), verb)}  {remark}")


def table(rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as they need to be; numbers to the right, a last column of ok or BROKEN in colour."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if isinstance(cell, int) else f"{cell:<{width}}"
            for cell, width in zip(row, widths, strict=True)
        ]
        last = str(row[-1])
        if last in COLOURS:
            cells[-1] = coloured(last, last)
        say("  ".join(cells).rstrip())
