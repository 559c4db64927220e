"""What happened under fault, on one clock and in one order.

Every process appends to one file, an event a line. The order of the lines is the order in which the events
reached the place that all share; their stamps tell how long that took.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def now() -> float:
    """Seconds on the clock of all processes, which nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Event:
    """One line.

    ``at`` was stamped before it was written. It reached the file between ``reached`` and ``settled``: not
    before any line above it was stamped, and before anybody who wrote below it stamped the next one.
    """

    what: str
    at: float
    process: int
    details: Mapping[str, Any] = field(default_factory=dict)
    reached: float = 0.0
    settled: float = 0.0

    def __getitem__(self, name: str) -> Any:
        return self.details[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.details.get(name, default)


class Journal:
    """The file, open for appending; a forked child may go on using it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # A process stamps no line before it has written the one before.
        self._one_at_a_time = threading.Lock()

    def write(self, what: str, **details: Any) -> float:
        """Append one event by one call to the kernel; gives its stamp."""
        with self._one_at_a_time:
            at = now()
            line = json.dumps({"what": what, "at": at, "process": os.getpid(), **details})
            # The line break before it ends what a killed process may have written of its last line.
            os.write(self._file, f"\n{line}\n".encode())
        return at


class Tail:
    """Reads a journal while others write it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""

    def events(self) -> Iterator[Event]:
        """Those that have come since it was asked last."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        yield from _parsed(lines)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Event]:
    """The whole history, in its order."""
    return arranged(_parsed(path.read_bytes().split(b"\n")))


def arranged(events: Iterable[Event]) -> list[Event]:
    """The events in the order given, each with the bounds of when it reached the file."""
    events = list(events)
    reached = 0.0
    lower = [reached := max(reached, event.at) for event in events]
    upper: list[float] = []
    settled = float("inf")
    next_of_process: dict[int, float] = {}
    for event in reversed(events):
        # Whatever stands above a line was written before that one was.
        settled = min(settled, next_of_process.get(event.process, float("inf")))
        upper.append(settled)
        next_of_process[event.process] = event.at
    last = lower[-1] if lower else 0.0
    return [
        Event(event.what, event.at, event.process, event.details, earliest, max(earliest, min(latest, last)))
        for event, earliest, latest in zip(events, lower, reversed(upper), strict=True)
    ]


def _parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    for line in lines:
        if not line:
            continue
        try:
            details = json.loads(line)
        except ValueError:
            # The last line of a process that was killed while it wrote.
            continue
        yield Event(details.pop("what"), details.pop("at"), details.pop("process"), details)
