"""Workers under fault for as long as is asked, and then everything that the checkers say about it.

    python -m tests.faults.soak --minutes 30 [--seed 7] [--mode strict|default|naive]

starts its own servers, and ends them. The exit code is 1 if something was found that the mode does not admit:
"strict" admits nothing, "default" what a lease cannot help. "naive" is the positive control, which has to be
found out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from example_project.servers import POSTGRESQL_FOLDERS
from tests.faults import checkers, histories, nemeses, reports
from tests.faults.nemeses import Aim, Planned
from tests.faults.stages import Stage

MODES = ("strict", "default", "naive")

LEASE = 3.0

TICK = 0.02

# How long a fault waits for somebody whom it can hit.
AIM_SECONDS = 1.5

# How long the queues may take to be empty when nothing is broken any more, and until then the workers are
# started anew: a child that is killed while it takes a job leaves a gap in Celery's own books.
REST_SECONDS = 120.0
RENEW_SECONDS = 45.0


@dataclass
class Ordeal:
    """The schedule as it is carried out."""

    stage: Stage
    seed: int
    plan: Iterator[Planned]

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._numbers = 0
        self._next = next(self.plan, None)
        self._to_heal: list[tuple[float, int, Planned, Aim]] = []
        self._holders: dict[int, str] = {}

    @property
    def is_over(self) -> bool:
        return self._next is None and not self._to_heal

    def tick(self) -> None:
        """Inject what is due, and heal what has lasted long enough."""
        passed = time.monotonic() - self.started
        for entry in list(self._to_heal):
            if entry[0] <= passed:
                self._to_heal.remove(entry)
                self._heal(*entry[1:])
        if self._next is not None and self._next.at <= passed:
            is_late = passed > self._next.at + AIM_SECONDS
            if self._inject(self._next, passed) or is_late:
                self._next = next(self.plan, None)

    def heal_all(self) -> None:
        self._next = None
        for _, number, planned, aim in self._to_heal:
            self._heal(number, planned, aim)
        self._to_heal.clear()

    def _inject(self, planned: Planned, passed: float) -> bool:
        """Whether it was done, or cannot be."""
        stage, fault = self.stage, planned.fault
        chance = random.Random(f"{self.seed} {planned.group} {planned.part}")
        holders = stage.holders()
        # The second of a pair hits whom the first one has hit.
        aimed = [holder for holder in holders if holder.attempt == self._holders.get(planned.group)]
        holder = chance.choice(aimed or holders) if holders else None
        if fault.most and holders and not aimed:
            # What lasts is for somebody who is there for longer.
            holder = max(holders, key=lambda one: one.ends_at)
        if fault.needs_a_holder:
            if holder is None or holder.backend is None:
                return False
            self._holders[planned.group] = holder.attempt
            holders = [one for one in holders if one == holder or fault.hits == "worker"]
            holders = [one for one in holders if one.worker == holder.worker]
        elif fault.hits == "nobody":
            holders = []
        self._numbers += 1
        number = self._numbers
        stage.journal.write(
            "fault begins",
            number=number,
            name=fault.name,
            does=fault.does,
            group=planned.group,
            group_name=planned.group_name,
            holders=[asdict(one) for one in holders],
        )
        aim = Aim(chance, holder)
        if fault.inject(stage, aim) is False:
            stage.journal.write("fault missed", number=number)
            return True
        self._to_heal.append((passed + planned.seconds, number, planned, aim))
        return True

    def _heal(self, number: int, planned: Planned, aim: Aim) -> None:
        if planned.fault.heal is not None:
            planned.fault.heal(self.stage, aim)
        self.stage.journal.write("fault ends", number=number, name=planned.fault.name)


def torment(stage: Stage, seed: int, seconds: float) -> None:
    """Let the faults come, for as long or until the control is found out."""
    ordeal = Ordeal(stage, seed, nemeses.schedule(seed, stage.mode, seconds, stage.lease))
    looked = restored = time.monotonic()
    while not ordeal.is_over or time.monotonic() < ordeal.started + seconds:
        stage.tick()
        ordeal.tick()
        passed = time.monotonic()
        if passed > restored + 1:
            restored = passed
            stage.redeliver()
        if stage.mode == "naive" and passed > looked + 1:
            looked = passed
            if checkers.overlaps(histories.read(stage.path)):
                break
        time.sleep(TICK)
    ordeal.heal_all()


def rest(stage: Stage) -> None:
    """Wait until all the messages have come to an end."""
    stage.come_to_rest()
    started = time.monotonic()
    renew_at = started + RENEW_SECONDS
    while time.monotonic() < started + REST_SECONDS:
        stage.tick()
        if not stage.messages.backlog() and not stage.someone_works and not stage.unfinished():
            return
        if time.monotonic() > renew_at:
            renew_at += RENEW_SECONDS
            stage.journal.write("worker", text="the queues are not empty, so the workers are started anew")
            for worker in stage.workers.all:
                worker.end_politely()
        stage.redeliver()
        time.sleep(0.2)


def soak(mode: str, seconds: float, seed: int, folder: Path, version: str) -> reports.Report:
    """One run, from the first server to the report."""
    # Usually somebody waits for each key, and never a crowd: after a brief run it would take too long.
    most = 2 if seconds < nemeses.BRIEFLY else 4
    with Stage(mode, seed, folder, lease=LEASE, version=version, most_messages=most) as stage:
        torment(stage, seed, seconds)
        if mode != "naive":
            rest(stage)
            # Sessions that idle are closed after half a lease.
            stage.note_leaks(patience=LEASE + 5)
            stage.note_what_became_of_all()
    return reports.report(histories.read(stage.path), mode, LEASE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--mode", choices=MODES, default="strict")
    parser.add_argument("--postgresql", choices=sorted(POSTGRESQL_FOLDERS), default="18")
    parser.add_argument("--keep", type=Path, help="a folder for the history and the workers' logs")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="pglock-faults-")))
        if arguments.keep is not None:
            resources.callback(_keep, folder, arguments.keep)
        _say(f"mode {arguments.mode}, {arguments.minutes:g} minutes, seed {arguments.seed}")
        try:
            report = soak(
                arguments.mode, 60 * arguments.minutes, arguments.seed, folder, arguments.postgresql
            )
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        _say(report.table())
        for violation in report.violations:
            _say(f"NOT ADMITTED: {violation}")
        _say(f"mode {arguments.mode}, seed {arguments.seed}: {len(report.violations)} violations")
    return 1 if report.violations else 0


def _keep(folder: Path, where: Path) -> None:
    where.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        shutil.copy2(file, where)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
