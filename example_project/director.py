"""One performance: the work is sent, and watched until its end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from example_project.display import say
from example_project.processes import OPERATOR, WORKERS, Processes
from example_project.scenes import work
from example_project.watcher import Watcher, everything_has_ended, ready_workers

READY_SECONDS = 60.0
DRAIN_SECONDS = 30.0
TICK_SECONDS = 0.1


class Director:
    """Sends the work to the processes for so many seconds, unless a signal cuts that short."""

    def __init__(self, processes: Processes, seconds: float) -> None:
        self.processes = processes
        self.seconds = seconds
        self.watcher = Watcher()
        # The signal's number: a flag, so that nothing is torn in the middle.
        self.stopped_by = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def perform(self) -> bool:
        """Whether it came to its end: everything was sent, and has ended."""
        self.processes.start_workers()
        self.processes.start_site()
        if not self._until(lambda: ready_workers() == len([*WORKERS, OPERATOR]), READY_SECONDS):
            return False
        self.processes.start_beat()
        started = time.monotonic()
        for offset, signature in work(self.seconds):
            if not self._until_moment(started + offset):
                return False
            signature.apply_async()
        if not self._until_moment(started + self.seconds):
            return False
        say("\nNothing more is sent; what is on its way comes to its end.\n")
        self.processes.stop_beat()
        return self._until(everything_has_ended, DRAIN_SECONDS)

    def _until_moment(self, moment: float) -> bool:
        return self._until(lambda: time.monotonic() >= moment, seconds=self.seconds)

    def _until(self, is_so: Callable[[], bool], seconds: float) -> bool:
        """Watch until it is so; False where a signal, a dead process or these seconds came first."""
        give_up = time.monotonic() + seconds
        while not is_so():
            if self.stopped_by or not self.processes.all_run() or time.monotonic() > give_up:
                return False
            time.sleep(TICK_SECONDS)
            self.watcher.look()
        return True

    def _stop(self, number: int, frame: object) -> None:
        self.stopped_by = number
