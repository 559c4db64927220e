"""The faults, and the schedule by which they come: singly and in pairs, the same for the same seed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psycopg

from tests.faults.stages import Holder, Stage

Injection = Callable[[Stage, "Aim"], bool | None]


@dataclass
class Aim:
    """What one fault is to hit: a holder if there is one, and chance for all else."""

    random: random.Random
    holder: Holder | None


@dataclass(frozen=True)
class Fault:
    """A fault. ``inject`` answers False if there was nothing to hit.

    ``least`` and ``most`` bound how long it lasts, in leases. ``does`` is what checkers have to know: that
    the process of the holder was "stopped", that it "cuts off" whom it hits, or that it "ends sessions".
    ``hits`` says who that is:
    one "holder", all the holders of his "worker", "everybody", or "nobody" in particular.
    """

    name: str
    inject: Injection
    heal: Injection | None = None
    least: float = 0.0
    most: float = 0.0
    does: str = ""
    hits: str = "holder"

    @property
    def needs_a_holder(self) -> bool:
        return self.hits in ("holder", "worker")


@dataclass(frozen=True)
class Planned:
    """One fault in the schedule: from when, for how long, and together with which other."""

    at: float
    seconds: float
    fault: Fault
    group: int
    part: int
    group_name: str


def _kill_child(stage: Stage, aim: Aim) -> None:
    _signal(aim, signal.SIGKILL)


def _stop_child(stage: Stage, aim: Aim) -> None:
    _signal(aim, signal.SIGSTOP)


def _continue_child(stage: Stage, aim: Aim) -> None:
    _signal(aim, signal.SIGCONT)


def _soft_limit(stage: Stage, aim: Aim) -> bool | None:
    assert aim.holder is not None
    if aim.holder.ends_at < _clock() + 0.1:
        # Outside of a body the signal hits Celery itself, to which no worker's limit would send it.
        return False
    _signal(aim, signal.SIGUSR1)
    return None


def _revoke(stage: Stage, aim: Aim) -> None:
    assert aim.holder is not None
    stage.revoke(aim.holder.task)


def _hard_limit(stage: Stage, aim: Aim) -> None:
    # It hits the body of a message of its own.
    stage.send(aim.random.choice(stage.keys), 1.5, time_limit=0.6)


def _kill_worker(stage: Stage, aim: Aim) -> bool:
    worker = aim.random.choice(stage.workers.all)
    return worker.runs and not stage.kill(worker)


def _shut_down_worker(stage: Stage, aim: Aim) -> None:
    aim.random.choice(stage.workers.all).end_politely()


def _terminate_session(stage: Stage, aim: Aim) -> bool | None:
    return _tell_backend(stage, aim, "pg_terminate_backend")


def _cancel_session(stage: Stage, aim: Aim) -> bool | None:
    return _tell_backend(stage, aim, "pg_cancel_backend")


def _restart_fast(stage: Stage, aim: Aim) -> None:
    stage.cluster.restart("fast")


def _restart_immediately(stage: Stage, aim: Aim) -> None:
    stage.cluster.restart("immediate")


def _cut_locks(stage: Stage, aim: Aim) -> None:
    for path in stage.locks_paths:
        path.cut()


def _cut_work(stage: Stage, aim: Aim) -> None:
    stage.work_path.cut()


def _refuse_locks(stage: Stage, aim: Aim) -> None:
    for path in stage.locks_paths:
        path.refuse()


def _swallow_locks(stage: Stage, aim: Aim) -> None:
    for path in stage.locks_paths:
        path.black_hole()


def _swallow_locks_of_one_worker(stage: Stage, aim: Aim) -> None:
    assert aim.holder is not None
    stage.locks_paths[aim.holder.worker].black_hole()


def _heal_locks(stage: Stage, aim: Aim) -> None:
    # What was swallowed comes late, or never.
    deliver = aim.random.random() < 0.5
    for path in stage.locks_paths:
        path.heal(deliver=deliver)


def _swallow_work(stage: Stage, aim: Aim) -> None:
    stage.work_path.black_hole()


def _heal_work(stage: Stage, aim: Aim) -> None:
    stage.work_path.heal(deliver=aim.random.random() < 0.5)


def _refuse_messages(stage: Stage, aim: Aim) -> None:
    stage.messages.refuse()


def _accept_messages(stage: Stage, aim: Aim) -> None:
    stage.messages.accept()


def _redeliver(stage: Stage, aim: Aim) -> None:
    stage.redeliver(visibility_timeout=0)


KILL_CHILD = Fault("kill a child", _kill_child)
STOP_BRIEFLY = Fault("stop a child, 0.3 T", _stop_child, _continue_child, 0.3, 0.3, "stopped")
STOP_NEARLY_A_LEASE = Fault("stop a child, 0.9 T", _stop_child, _continue_child, 0.9, 0.9, "stopped")
STOP_LONG = Fault("stop a child, 3 T", _stop_child, _continue_child, 3, 3, "stopped")
SOFT_LIMIT = Fault("soft time limit", _soft_limit)
REVOKE = Fault("revoke and terminate", _revoke)
HARD_LIMIT = Fault("hard time limit", _hard_limit, hits="nobody")
KILL_WORKER = Fault("kill a worker", _kill_worker, hits="nobody")
SHUT_DOWN_WORKER = Fault("warm shutdown", _shut_down_worker, hits="nobody")
TERMINATE = Fault("terminate a session", _terminate_session, does="ends sessions")
CANCEL = Fault("cancel a session", _cancel_session)
RESTART_FAST = Fault("restart, fast", _restart_fast, does="ends sessions", hits="everybody")
RESTART_IMMEDIATE = Fault("restart, immediate", _restart_immediately, does="ends sessions", hits="everybody")
CUT_LOCKS = Fault("cut the locks' way", _cut_locks, does="ends sessions", hits="everybody")
CUT_WORK = Fault("cut the work's way", _cut_work, hits="nobody")
REFUSE_LOCKS = Fault(
    "no way to the locks", _refuse_locks, _heal_locks, 0.3, 1, "ends sessions", hits="everybody"
)
BLACK_HOLE = Fault(
    "black hole", _swallow_locks_of_one_worker, _heal_locks, 0.3, 1.8, "cuts off", hits="worker"
)
BLACK_HOLE_FOR_ALL = Fault(
    "black hole for all", _swallow_locks, _heal_locks, 0.3, 1.8, "cuts off", hits="everybody"
)
BLACK_HOLE_WORK = Fault("black hole before the work", _swallow_work, _heal_work, 0.3, 1, hits="nobody")
REFUSE_MESSAGES = Fault("broker refuses messages", _refuse_messages, _accept_messages, 0.5, 1, hits="nobody")
REDELIVER = Fault("redelivery", _redeliver, hits="nobody")

ALL = (
    KILL_CHILD,
    STOP_BRIEFLY,
    STOP_NEARLY_A_LEASE,
    STOP_LONG,
    SOFT_LIMIT,
    REVOKE,
    HARD_LIMIT,
    KILL_WORKER,
    SHUT_DOWN_WORKER,
    TERMINATE,
    CANCEL,
    RESTART_FAST,
    RESTART_IMMEDIATE,
    CUT_LOCKS,
    CUT_WORK,
    REFUSE_LOCKS,
    BLACK_HOLE,
    BLACK_HOLE_FOR_ALL,
    BLACK_HOLE_WORK,
    REFUSE_MESSAGES,
    REDELIVER,
)

# What shows best whether a lock can be trusted: these come as often as all the others together.
TELLING = (
    (BLACK_HOLE, TERMINATE),
    (BLACK_HOLE, STOP_NEARLY_A_LEASE),
    (BLACK_HOLE, RESTART_IMMEDIATE),
    (STOP_BRIEFLY, TERMINATE),
    (STOP_NEARLY_A_LEASE, TERMINATE),
    (STOP_NEARLY_A_LEASE, RESTART_FAST),
    (KILL_CHILD, REDELIVER),
    (REDELIVER, TERMINATE),
    (REFUSE_MESSAGES, TERMINATE),
    (REFUSE_MESSAGES, REFUSE_LOCKS),
    (BLACK_HOLE, BLACK_HOLE_WORK),
)

# For a run of seconds: the ones that are over soon.
BRIEF = (
    (TERMINATE,),
    (KILL_WORKER,),
    (BLACK_HOLE, TERMINATE),
    (KILL_CHILD, REDELIVER),
    (STOP_BRIEFLY, TERMINATE),
    (REFUSE_MESSAGES, RESTART_IMMEDIATE),
    (CUT_LOCKS,),
)

# For the control: what takes a session from under its holder.
ENDS_SESSIONS: Sequence[tuple[Fault, ...]] = ((TERMINATE,), (CUT_LOCKS,), (RESTART_FAST,))

# A run of fewer seconds is a brief one.
BRIEFLY = 60.0

# Seconds in which nothing happens, between one group of faults and the next.
CALM = (0.4, 1.5)


def schedule(seed: int, mode: str, seconds: float, lease: float) -> Iterator[Planned]:
    """What comes when; the same for the same seed."""
    chance = random.Random(f"{seed} schedule")
    at = chance.uniform(*CALM)
    groups = itertools.count()
    while True:
        for faults in _deck(chance, mode, seconds):
            group = next(groups)
            ends = begins = at
            name = " + ".join(fault.name for fault in faults)
            for part, fault in enumerate(faults):
                lasts = lease * chance.uniform(fault.least, fault.most)
                yield Planned(begins, lasts, fault, group, part, name)
                ends = max(ends, begins + lasts)
                begins += chance.uniform(0.02, 0.5)
            at = ends + chance.uniform(*CALM)
            if at > seconds:
                return


def _deck(chance: random.Random, mode: str, seconds: float) -> Sequence[tuple[Fault, ...]]:
    """Single faults and pairs, each of which comes up once."""
    if mode != "naive" and seconds < BRIEFLY:
        return BRIEF
    if mode == "naive":
        deck = list(ENDS_SESSIONS)
    else:
        deck = [*((fault,) for fault in ALL), *TELLING, *TELLING, *(_pair(chance) for _ in ALL)]
    chance.shuffle(deck)
    return deck


def _pair(chance: random.Random) -> tuple[Fault, ...]:
    while True:
        pair = chance.sample(ALL, 2)
        # Two that take the same thing in hand would heal each other.
        if len({_hand(fault) for fault in pair}) == 2:
            return tuple(pair)


def _hand(fault: Fault) -> object:
    return fault.heal or fault.name


def _signal(aim: Aim, number: signal.Signals) -> None:
    assert aim.holder is not None
    with suppress(ProcessLookupError):
        os.kill(aim.holder.process, number)


def _tell_backend(stage: Stage, aim: Aim, function: str) -> bool | None:
    assert aim.holder is not None
    backend = aim.holder.backend
    if backend is None:
        return False
    try:
        with stage.connect() as connection:
            (done,) = connection.execute(f"SELECT {function}(%s)", [backend]).fetchone() or (False,)
    except psycopg.Error:
        return False
    return bool(done)


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
