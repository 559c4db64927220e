"""Processes of this package that do something at the same time, and answer with what they saw."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmarks import settings_with_app

# Long enough for all to have been started, in seconds.
START_SECONDS = 0.2


@contextmanager
def processes(number: int, url: str) -> Iterator[ProcessPoolExecutor]:
    """So many, with the database of this URL; each has begun when the block does."""
    # Forked children would share what their parent has opened.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, context, initializer=_set_up, initargs=(url,)) as executor:
        for begun in [executor.submit(time.sleep, START_SECONDS) for _ in range(number)]:
            begun.result()
        yield executor


def at_once(
    executor: ProcessPoolExecutor, number: int, function: Callable[..., Any], *arguments: Any
) -> Sequence[Future[Any]]:
    """Call it in so many of them with the moment at which all begin, on the monotonic clock of the host."""
    start = time.monotonic() + START_SECONDS
    return [executor.submit(function, start, *arguments) for _ in range(number)]


def wait_for(moment: float) -> None:
    """Return at this moment of the monotonic clock."""
    time.sleep(max(0.0, moment - time.monotonic()))


def processor_seconds() -> float:
    """What all threads of this process have used so far, by Linux's own count of nanoseconds."""
    total = 0
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


def quantile(sorted_figures: Sequence[float], part: float) -> float:
    """The figure below which this part of them lies."""
    return sorted_figures[min(len(sorted_figures) - 1, int(len(sorted_figures) * part))]


def _set_up(url: str) -> None:
    os.environ["DATABASE_URL"] = url
    settings_with_app.set_up()
