"""What must hold in a history, whatever the faults were: pure functions that find what does not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from tests.faults.histories import Event

History = Sequence[Event]
Token = tuple[int, int]

# What is done under a lock and is protected by nothing but the lock.
EFFECTS = ("attempt", "step")


@dataclass(frozen=True)
class Overlap:
    """A holder that had an effect after the next one had begun.

    ``late`` is for how many seconds after that it went on at least, not counting how long its process was
    stopped, or everybody was held up. ``had_asked`` says that for each such effect it had asked whether the
    lock was still its own before the next one began, and paused in between: which only a fence could close.
    ``asks`` is False for whoever relies on being interrupted, ``was_ended`` for whoever lost the lock by
    its own silence alone.
    """

    key: str
    attempt: str
    next_attempt: str
    effects: int
    late: float
    pause: float
    asks: bool
    had_asked: bool
    was_stopped: bool
    was_cut_off: bool
    was_ended: bool


@dataclass(frozen=True)
class StaleWrite:
    """A fenced write that was accepted although a higher token had been given out."""

    key: str
    token: Token
    newer: Token
    late: float


@dataclass(frozen=True)
class Inversion:
    """A later holder of a key whose token is not higher."""

    key: str
    attempt: str
    token: Token
    before: Token


@dataclass(frozen=True)
class Accounts:
    """Where the messages are at the end, by their ids."""

    sent: int
    done: int
    skipped: int
    failed: int
    queued: int
    lost: tuple[str, ...]
    # On their way into a worker that hung, and had to be killed: Celery's own loss.
    lost_with_a_worker: tuple[str, ...]
    # Said to be done, and no body came to its end.
    imagined: tuple[str, ...]
    # Skipped because of an earlier delivery of themselves.
    skipped_by_themselves: tuple[str, ...]


@dataclass(frozen=True)
class Latency:
    """Seconds from the beginning of a fault until something came of it; one for each holder that it hit."""

    fault: str
    gave_up: tuple[float, ...]
    freed: tuple[float, ...]
    taken_again: tuple[float, ...]
    # Of those that did both: the holder first, and then the server.
    gave_up_first: int
    both: int


def holds(history: History) -> list[Event]:
    """The bodies that began."""
    return [event for event in history if event.what == "attempt"]


def faults(history: History) -> Counter[str]:
    """How often what was done to them: single faults, and pairs."""
    groups = {event["group"]: event["group_name"] for event in _faults(history)}
    return Counter(groups.values())


def overlaps(history: History) -> list[Overlap]:
    """The holders that had effects after the next holder of their key had begun."""
    found: dict[tuple[str, str], list[tuple[Event, Event]]] = defaultdict(list)
    for takeovers, effect in _effects(history):
        if later := takeovers.later_than(effect["attempt"]):
            found[effect["attempt"], later["attempt"]].append((effect, later))
    stops = _intervals(history, "stopped")
    stalls = [(event.at - event["seconds"], event.at) for event in history if event.what == "stall"]
    holes = [(begins, ends) for begins, ends, _ in _intervals(history, "cuts off")]
    endings = [begins for begins, _, _ in _intervals(history, "ends sessions")]
    began = {event["attempt"]: event.at for event in holds(history)}
    answers = []
    for (attempt, next_attempt), pairs in found.items():
        delays = []
        for effect, later in pairs:
            since, until = later.settled, effect.reached
            pauses = [
                (begins, ends) for begins, ends, processes in stops if effect.process in processes
            ] + stalls
            delays.append(max(0.0, until - since - _covered(pauses, since, until)))
        last = max(effect.reached for effect, _ in pairs)
        answers.append(
            Overlap(
                key=pairs[0][0]["key"],
                attempt=attempt,
                next_attempt=next_attempt,
                effects=len(pairs),
                late=max(delays),
                pause=max(
                    (effect.reached - effect["asked"] for effect, _ in pairs if effect["asked"]), default=0.0
                ),
                asks=any(effect["asked"] for effect, _ in pairs),
                was_stopped=any(
                    _covered([(begins, ends)], began.get(attempt, last), last)
                    for begins, ends, processes in stops
                    if pairs[0][0].process in processes
                ),
                had_asked=all(
                    effect["asked"] and effect["asked"] <= later.settled for effect, later in pairs
                ),
                was_cut_off=_covered(holes, began.get(attempt, last), last) > 0,
                was_ended=any(
                    began.get(attempt, last) <= ends_at <= pairs[0][1].settled for ends_at in endings
                ),
            )
        )
    return answers


def stale_writes(history: History) -> list[StaleWrite]:
    """The writes that were accepted after a higher token of their key had been given out.

    ``given`` and ``committed`` are stamped by the server in the transactions themselves.
    """
    given: dict[str, list[tuple[float, Token]]] = defaultdict(list)
    for event in history:
        if event.what == "given":
            given[event["key"]].append((event["committed_at"], _token(event)))
    found = []
    written: dict[str, Token] = {}
    for event in history:
        if event.what != "committed":
            continue
        key, token, at = event["key"], _token(event), event["committed_at"]
        before = [(given_at, other) for given_at, other in given[key] if given_at < at and other > token]
        if before:
            given_at, newer = max(before, key=lambda pair: pair[1])
            found.append(StaleWrite(key, token, newer, at - given_at))
        elif written.get(key, token) > token:
            # The rows of one key are written in one order.
            found.append(StaleWrite(key, token, written[key], 0.0))
        written[key] = max(written.get(key, token), token)
    return found


def broken_fences(history: History) -> list[str]:
    """The attempts of whose writes in one transaction one was accepted and another was not."""
    return [event["attempt"] for event in history if event.what == "fence broken"]


def inversions(history: History) -> list[Inversion]:
    """The holders whose token does not rise above all that were given out before for their key."""
    found = []
    highest: dict[str, Token] = {}
    known: dict[str, set[Token]] = defaultdict(set)
    begun: set[str] = set()
    for takeovers, effect in _effects(history):
        attempt, key = effect["attempt"], effect["key"]
        event = takeovers.attempts[attempt]
        if not event.get("token"):
            continue
        token = _token(event)
        if attempt not in begun:
            begun.add(attempt)
            if token in known[key]:
                found.append(Inversion(key, attempt, token, token))
            known[key].add(token)
        if takeovers.latest is effect:
            if token < highest.get(key, token):
                found.append(Inversion(key, attempt, token, highest[key]))
            highest[key] = max(highest.get(key, token), token)
    return found


def accounts(history: History) -> Accounts:
    """Whether every message that was sent is still somewhere, or has a recorded end."""
    finished = {event["attempt"] for event in history if event.what == "ended" and event["how"] == "done"}
    with_a_body = {event["task"] for event in holds(history) if event["attempt"] in finished}
    counts: Counter[str] = Counter()
    lost, lost_with_a_worker, imagined = [], [], []
    with_a_worker = {
        task for event in history if event.what == "lost with a worker" for task in event["tasks"]
    }
    sent = [event["task"] for event in history if event.what == "sent"]
    ends = {event["task"]: event for event in history if event.what == "outcome"}
    for task in sent:
        end = ends.get(task)
        outcome = end["outcome"] if end is not None else "lost"
        counts[outcome] += 1
        if outcome == "lost":
            (lost_with_a_worker if task in with_a_worker else lost).append(task)
        if outcome == "done" and task not in with_a_body:
            imagined.append(task)
    own = [
        event["task"] for event in history if event.what == "skipped" and event["task"] in event["holders"]
    ]
    return Accounts(
        sent=len(sent),
        done=counts["done"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        queued=counts["queued"],
        lost=tuple(lost),
        lost_with_a_worker=tuple(lost_with_a_worker),
        imagined=tuple(imagined),
        skipped_by_themselves=tuple(own),
    )


def leaks(history: History) -> list[str]:
    """What was left on the server when all the workers were idle."""
    return [event["text"] for event in history if event.what == "left behind"]


def latencies(history: History) -> list[Latency]:
    """How long it took until holders gave up, their keys were free, and taken again, by kind of fault."""
    gave_up: dict[str, list[float]] = defaultdict(list)
    freed: dict[str, list[float]] = defaultdict(list)
    taken: dict[str, list[float]] = defaultdict(list)
    first: Counter[str] = Counter()
    both: Counter[str] = Counter()
    names: list[str] = []
    ended = {event["attempt"]: event for event in history if event.what == "ended"}
    gave_up_of = {event["attempt"]: event.at for event in history if event.what == "gave up"}
    attempts: dict[str, list[Event]] = defaultdict(list)
    for event in holds(history):
        attempts[event["key"]].append(event)
    unheld: dict[tuple[str, int], list[float]] = defaultdict(list)
    for event in history:
        if event.what == "freed":
            unheld[event["key"], event["backend"]].append(event.at)
    seen: set[tuple[int, str]] = set()
    begins = {event["group"]: event.at for event in reversed(list(_faults(history)))}
    for fault in _faults(history):
        # What comes after the next faults have begun may have come of them.
        over = min((at for at in begins.values() if at > begins[fault["group"]]), default=float("inf"))
        name = fault["group_name"]
        if name not in names:
            names.append(name)
        for holder in fault["holders"]:
            key, attempt = holder["key"], holder["attempt"]
            end = ended.get(attempt)
            if (fault["group"], attempt) in seen or (end is not None and end["how"] == "done"):
                # Hit already by the other of a pair, or it came to its end as without the fault.
                continue
            seen.add((fault["group"], attempt))
            up = gave_up_of.get(attempt)
            up = up if up is not None and fault.at <= up < over else None
            free = next((at for at in unheld[key, holder["backend"]] if fault.at <= at < over), None)
            later = (one.at for one in attempts[key] if one["attempt"] != attempt and one.at >= fault.at)
            again = next(later, None)
            if up is not None:
                gave_up[name].append(up - fault.at)
            if free is not None:
                freed[name].append(free - fault.at)
            if up is not None and free is not None:
                both[name] += 1
                first[name] += up <= free
            if free is not None and again is not None:
                taken[name].append(again - fault.at)
    return [
        Latency(name, tuple(gave_up[name]), tuple(freed[name]), tuple(taken[name]), first[name], both[name])
        for name in sorted(names)
    ]


def median_and_most(seconds: Sequence[float]) -> str:
    """For people; empty if there is nothing to tell."""
    return f"{median(seconds):.2f} / {max(seconds):.2f}" if seconds else ""


class _Takeovers:
    """Who has held a key, in the order in which they began; of each the effect by which that is certain."""

    def __init__(self) -> None:
        self.attempts: dict[str, Event] = {}
        self._order: list[Event] = []
        self._position: dict[str, int] = {}

    @property
    def latest(self) -> Event | None:
        return self._order[-1] if self._order else None

    def see(self, effect: Event) -> None:
        if effect.what == "attempt":
            self.attempts[effect["attempt"]] = effect
        if effect["attempt"] in self._position:
            return
        if effect["asked"] is None and self.attempts[effect["attempt"]]["asked"] is not None:
            # It asked at first, and may have lost the lock since then.
            return
        latest = self.latest
        # A process that paused between asking and its effect may be late by now, so this effect proves no
        # takeover. Without asking, nothing but the order is known.
        if latest is not None and effect["asked"] is not None and effect["asked"] <= latest.settled:
            return
        self._position[effect["attempt"]] = len(self._order)
        self._order.append(effect)

    def later_than(self, attempt: str) -> Event | None:
        """The first effect of whoever took over from this attempt, if somebody has."""
        position = self._position.get(attempt)
        if position is None:
            return None
        return self._order[position + 1] if position + 1 < len(self._order) else None


def _effects(history: History) -> Iterator[tuple[_Takeovers, Event]]:
    takeovers: dict[str, _Takeovers] = defaultdict(_Takeovers)
    for event in history:
        if event.what in EFFECTS:
            takeovers[event["key"]].see(event)
            yield takeovers[event["key"]], event


def _intervals(history: History, effect: str) -> list[tuple[float, float, list[int]]]:
    """From when to when faults with this effect lasted, and which processes they hit."""
    end = history[-1].reached if history else 0.0
    ends = {event["number"]: event.reached for event in history if event.what == "fault ends"}
    return [
        (event.at, ends.get(event["number"], end), [holder["process"] for holder in event["holders"]])
        for event in _faults(history)
        if event["does"] == effect
    ]


def _faults(history: History) -> Iterator[Event]:
    missed = {event["number"] for event in history if event.what == "fault missed"}
    for event in history:
        if event.what == "fault begins" and event["number"] not in missed:
            yield event


def _covered(intervals: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """How many seconds between the two are covered by one of the intervals at least."""
    covered, at = 0.0, since
    for begins, ends in sorted(intervals):
        begins, ends = max(begins, at), min(ends, until)
        if ends > begins:
            covered += ends - begins
            at = ends
    return covered


def _token(event: Event) -> Token:
    timeline, number = event["token"]
    return timeline, number
