"""The workers, beat and the admin's site, as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from django.conf import settings

WORKERS = ("worker-1", "worker-2")
CHILDREN = 8
# What frees critical tasks must not wait behind them.
OPERATOR = "operator"

# What runs may end by itself, its wait for a lock included, before it is killed.
STOP_SECONDS = 15.0

PROJECT = Path(__file__).parent.parent


class Processes:
    """The workers, beat and the site; leaving the block stops what still runs."""

    def __init__(self, logs: Path, port: int) -> None:
        self.logs = logs
        self.port = port
        self.site: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.beat: list[subprocess.Popen[bytes]] = []

    def start_workers(self) -> None:
        options = ["--concurrency", str(CHILDREN), "--without-gossip", "--without-mingle"]
        for name in WORKERS:
            self.workers.append(self._celery(name, "worker", "--hostname", f"{name}@%h", *options))
        queue = ["--queues", settings.OPERATIONS, "--concurrency", "1", *options[2:]]
        self.workers.append(self._celery(OPERATOR, "worker", "--hostname", f"{OPERATOR}@%h", *queue))

    def start_site(self) -> None:
        # Without --insecure Django serves static files only while it is being debugged.
        options = ["--noreload", "--insecure", f"127.0.0.1:{self.port}"]
        self.site.append(self._run("site", "example_project.manage", "runserver", *options))

    def start_beat(self) -> None:
        self.beat.append(self._celery("beat", "beat", "--schedule", str(self.logs / "beat-schedule")))

    def stop_beat(self) -> None:
        stop(self.beat)
        self.beat.clear()

    def all_run(self) -> bool:
        return all(process.poll() is None for process in [*self.workers, *self.beat, *self.site])

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stop([*self.beat, *self.workers, *self.site])

    def _celery(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self._run(name, "celery", "-A", "example_project", *arguments, "--loglevel", "INFO")

    def _run(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C is for the director, who lets the others finish what they do.
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=PROJECT,
                start_new_session=True,
            )


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask them to end, and wait; the ones that take too long are killed."""
    for process in processes:
        process.terminate()
    give_up = time.monotonic() + STOP_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, give_up - time.monotonic()))
        # Its children are of its group; usually nobody is left.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
