"""The workers under fault; whoever of them dies is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

PROJECT = Path(__file__).parent.parent.parent

START_SECONDS = 60.0

# A worker that was asked to end and has not for so long is killed.
END_SECONDS = 25.0


class Worker:
    """One worker after the other, under one name."""

    def __init__(self, number: int, concurrency: int, folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name = f"worker{number}"
        self.number = number
        self.log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "celery", "-A", "tests.faults.work", "worker"]
        self._command += ["--concurrency", str(concurrency), "--loglevel", "INFO", "--hostname"]
        self._options = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self._environment = environment
        self._groups: list[int] = []
        self._end_by: float | None = None

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def has_been(self, process: int) -> bool:
        """Whether it is, or was, this process."""
        return process in self._groups

    @property
    def is_ready(self) -> bool:
        with self.log.open("rb") as log:
            log.seek(self._log_begins)
            return b" ready." in log.read()

    def start(self) -> None:
        name = f"{self.name}-{len(self._groups) + 1}@faults"
        self._log_begins = self.log.stat().st_size if self.log.exists() else 0
        self._end_by = None
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self._command, name, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=PROJECT,
                env=self._environment,
                start_new_session=True,
            )
        self._groups.append(self.process.pid)

    def end_politely(self) -> None:
        """Ask for a warm shutdown: what runs may come to its end."""
        self.process.terminate()
        self._end_by = time.monotonic() + END_SECONDS

    @property
    def is_overdue(self) -> bool:
        """Whether it was asked to end long ago, and has not."""
        return self.runs and self._end_by is not None and time.monotonic() > self._end_by

    def tell_where_it_is(self) -> None:
        """Let it write to its log what all its threads are doing: Celery does so on this signal."""
        self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Its children end with it."""
        self.process.kill()
        self.process.wait()

    def revive(self) -> str:
        """Start it again if it has ended; tells what was done."""
        if self.runs:
            return ""
        code = self.process.returncode
        self.start()
        return f"{self.name} had ended with {code}, and was started again"

    def kill_all(self) -> None:
        """The workers under this name, and all the children that they left."""
        for group in self._groups:
            self._kill_group(group)
        if self._groups:
            self.process.wait()

    def _kill_group(self, group: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class Workers:
    """One for each environment, from ``with`` on."""

    def __init__(self, concurrency: int, folder: Path, environments: Sequence[Mapping[str, str]]) -> None:
        self.all = [
            Worker(number, concurrency, folder, environment)
            for number, environment in enumerate(environments)
        ]

    def __enter__(self) -> Self:
        try:
            for worker in self.all:
                worker.start()
            self.wait_until_ready()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill()

    def wait_until_ready(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        for worker in self.all:
            while not worker.is_ready:
                if not worker.runs or time.monotonic() > give_up:
                    log = worker.log.read_text(errors="replace")
                    raise SystemExit(f"{worker.name} did not start:\n{log[-5000:]}")
                time.sleep(0.05)

    def _kill(self) -> None:
        for worker in self.all:
            worker.kill_all()
