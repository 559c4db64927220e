"""What a run under fault came to: a table for people, and what its mode does not admit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults import checkers
from tests.faults.checkers import Accounts, Inversion, Latency, Overlap, StaleWrite
from tests.faults.histories import Event

# A holder whose session was ended by somebody learns of it within 200 ms, and stops what it does.
LEARNS_WITHIN = 0.25

# One that is cut off meanwhile learns of it when it gives up.
GIVES_UP_AFTER = 0.6


@dataclass(frozen=True)
class Report:
    """What the checkers found in one history."""

    mode: str
    lease: float
    faults: dict[str, int]
    missed: int
    holds: int
    overlaps: Sequence[Overlap]
    writes_accepted: int
    writes_rejected: int
    stale_writes: Sequence[StaleWrite]
    broken_fences: Sequence[str]
    inversions: Sequence[Inversion]
    accounts: Accounts
    leaks: Sequence[str]
    latencies: Sequence[Latency]
    news: Sequence[str]

    @property
    def unsafe(self) -> list[Overlap]:
        """Those who went on although they had asked, or should have, after the next one had begun."""
        return [overlap for overlap in self.overlaps if not overlap.had_asked]

    @property
    def not_admitted(self) -> list[Overlap]:
        return [overlap for overlap in self.unsafe if overlap.late > self._admitted(overlap)]

    @property
    def violations(self) -> list[str]:
        """What the mode does not admit, in words."""
        if self.mode == "naive":
            return [] if self.unsafe else ["the control was not found out: these checkers are blind"]
        found = [f"unsafe hold: {overlap}" for overlap in self.not_admitted]
        found += [f"stale write: {write}" for write in self.stale_writes]
        found += [f"fence broken within a transaction: {attempt}" for attempt in self.broken_fences]
        found += [f"token inversion: {inversion}" for inversion in self.inversions]
        found += [f"lost message: {task}" for task in self.accounts.lost]
        found += [f"still queued: {self.accounts.queued} messages"] if self.accounts.queued else []
        found += [f"said to be done without a body: {task}" for task in self.accounts.imagined]
        found += [f"skipped because of itself: {task}" for task in self.accounts.skipped_by_themselves]
        found += [f"left behind: {text}" for text in self.leaks]
        return found

    def _admitted(self, overlap: Overlap) -> float:
        if self.mode == "strict":
            # Who does not ask cannot know anything in the moment in which its process goes on.
            return LEARNS_WITHIN if overlap.was_stopped and not overlap.asks else -1
        # The one hole of a lease: a session that is ended while its holder is cut off.
        hole = overlap.was_cut_off and overlap.was_ended
        return LEARNS_WITHIN + (GIVES_UP_AFTER * self.lease if hole else 0)

    def table(self) -> str:
        """For people."""
        lines = ["", "faults"]
        width = max(map(len, self.faults), default=0)
        lines += [f"  {name:{width}}  {count:4}" for name, count in sorted(self.faults.items())]
        lines += [f"  {'(nothing to hit)':{width}}  {self.missed:4}", ""]
        admitted = [overlap for overlap in self.unsafe if overlap not in self.not_admitted]
        paused = [overlap for overlap in self.overlaps if overlap.had_asked]
        lines.append(f"holds                {self.holds:6}")
        lines.append(f"  unsafe             {len(self.unsafe):6}{_longest(self.unsafe)}")
        lines.append(f"  of them admitted   {len(admitted):6}{_longest(admitted)}")
        lines.append(f"    of those cut off {sum(overlap.was_cut_off for overlap in admitted):6}")
        lines.append(f"  paused after check {len(paused):6}{_longest(paused)}")
        lines.append(f"fenced writes        {self.writes_accepted:6} accepted")
        lines.append(f"                     {self.writes_rejected:6} rejected")
        lines.append(f"                     {len(self.stale_writes):6} stale")
        lines.append(f"token inversions     {len(self.inversions):6}")
        lines.append(f"messages sent        {self.accounts.sent:6}")
        for name in ("done", "skipped", "failed", "queued"):
            lines.append(f"  {name:18} {getattr(self.accounts, name):6}")
        lines.append(f"  LOST               {len(self.accounts.lost):6}")
        lines.append(f"  lost with a worker {len(self.accounts.lost_with_a_worker):6}")
        lines.append(f"  skipped by itself  {len(self.accounts.skipped_by_themselves):6}")
        lines.append(f"leaks                {len(self.leaks):6}")
        lines += ["", "seconds after a fault (median / most)"]
        width = max((len(latency.fault) for latency in self.latencies), default=0)
        lines.append(
            f"  {'':{width}}  {'gave up':>13}  {'freed':>13}  {'taken again':>13}  gave up before freed"
        )
        for latency in self.latencies:
            if not latency.freed and not latency.gave_up:
                continue
            cells = [
                f"{checkers.median_and_most(seconds):>13}"
                for seconds in (latency.gave_up, latency.freed, latency.taken_again)
            ]
            before = f"{latency.gave_up_first} of {latency.both}" if latency.both else ""
            lines.append(f"  {latency.fault:{width}}  {'  '.join(cells)}  {before}")
        if self.news:
            lines += ["", "workers", *(f"  {text}" for text in self.news)]
        return "\n".join([*lines, ""])


def report(history: Sequence[Event], mode: str, lease: float) -> Report:
    """Everything that the checkers find in a history."""
    writes = [event["accepted"] for event in history if event.what == "fenced write"]
    return Report(
        mode=mode,
        lease=lease,
        faults=dict(checkers.faults(history)),
        missed=sum(event.what == "fault missed" for event in history),
        holds=len(checkers.holds(history)),
        overlaps=checkers.overlaps(history),
        writes_accepted=sum(writes),
        writes_rejected=len(writes) - sum(writes),
        stale_writes=checkers.stale_writes(history),
        broken_fences=checkers.broken_fences(history),
        inversions=checkers.inversions(history),
        accounts=checkers.accounts(history),
        leaks=checkers.leaks(history),
        latencies=checkers.latencies(history),
        news=[event["text"] for event in history if event.what == "worker"],
    )


def _longest(found: Sequence[Overlap]) -> str:
    return f"   the longest by {max(overlap.late for overlap in found):.3f} s" if found else ""
