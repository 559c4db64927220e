"""The ways in which tasks are run: each function gives what runs so many of those in ``TASK_APP``."""

from __future__ import annotations

import atexit
import importlib
import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

from benchmarks.celery_app import BATCH, DONE, FAILED, QUEUE
from benchmarks.rounds import ContenderFailed

Run = Callable[[int], None]

PATIENCE = 30.0  # seconds, the start of the worker among them


def eager() -> Run:
    """In this process, by ``delay()`` in eager mode, where locks that are taken by sending are taken, too."""
    task, numbers = _task(), itertools.count()

    def run(times: int) -> None:
        for _ in range(times):
            result = task.delay(next(numbers))
            if not result.successful():
                raise ContenderFailed(f"{result.state}: {result.result!r}")

    return run


def prefork() -> Run:
    """By a worker with two child processes."""
    return _worked_off("prefork")


def solo() -> Run:
    return _worked_off("solo")


def _task() -> Any:
    return importlib.import_module(os.environ["TASK_APP"]).task


def _worked_off(pool: str) -> Run:
    """From the first that is sent until the worker knows the result of the last."""
    # One app may be measured with different settings at a time.
    os.environ[QUEUE] = f"benchmark-{os.getpid()}"
    reader, writer = os.pipe()
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
    worker = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", pool],
        stdout=log,
        stderr=log,
        pass_fds=[writer],
        start_new_session=True,
        env={**os.environ, DONE: str(writer)},
    )
    os.close(writer)
    # Nothing that it still does matters, and its children must not outlive it.
    atexit.register(lambda: worker.poll() is None and os.killpg(worker.pid, signal.SIGKILL))
    task, numbers = _task(), itertools.count()

    def run(times: int) -> None:
        for _ in range(times):
            task.delay(next(numbers))
        for _ in range(times // int(os.environ[BATCH])):
            _wait_for_batch(reader, log)

    return run


def _wait_for_batch(reader: int, log: IO[str]) -> None:
    readable, _, _ = select.select([reader], [], [], PATIENCE)
    if not readable or os.read(reader, 1) in (FAILED, b""):
        raise ContenderFailed(_last_error(log) if readable else f"no result within {PATIENCE:g} s")


def _last_error(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    return lines[-1] if lines else "the worker ended without a word"
