"""Who waits for whom, root blockers first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from celery_pglock import labels, wordings
from celery_pglock.printed_texts import in_json, one_line
from celery_pglock.waiters import Pid

INDENT = "    "

# In a queue each is behind all before it, and every line would name hundreds.
MOST_NAMED = 10


@dataclass(slots=True, eq=False)
class Wait:
    """A row of ``PGLock`` that is waited for, once for each backend that is in the way."""

    lock: Any
    activity_id: int
    activity: Any
    blocking_activity_id: Pid
    blocking_activity: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)


@dataclass(frozen=True, slots=True)
class Backend:
    """Somebody in a tree; ``other_sessions`` are those of the same task."""

    pid: Pid
    activity: Any
    task_name: str
    task_id: str
    other_sessions: tuple[int, ...]
    is_in_cycle: bool

    def __str__(self) -> str:
        if self.pid is None:
            return wordings.PREPARED
        words = f"{self.pid} {wordings.backend(self.activity, self.task_name, self.task_id)}"
        if self.other_sessions:
            is_one = len(self.other_sessions) == 1
            others = " and ".join(map(str, self.other_sessions))
            words += f", the other session{' of its task is' if is_one else 's of its task are'} {others}"
        return words + (", in a cycle" if self.is_in_cycle else "")

    def in_json(self) -> dict[str, Any]:
        activity = self.activity
        return {
            "pid": self.pid,
            "task_name": self.task_name,
            "task_id": self.task_id,
            "application_name": activity and activity.application_name,
            "state": activity and activity.state,
            "in_state": in_json(wordings.in_state(activity)),
            "query": activity and activity.query,
            "other_sessions": list(self.other_sessions),
            "is_in_cycle": self.is_in_cycle,
        }


@dataclass(frozen=True, slots=True)
class Tree:
    """A backend with those who wait for it; ``repeated`` are waits of backends that have another place."""

    backend: Backend
    wait: Any
    waiters: tuple[Tree, ...]
    repeated: tuple[Any, ...]

    def lines(self) -> Iterator[str]:
        """One line for each backend, indented below the one for which it waits."""
        left: list[tuple[Tree | str, int]] = [(self, 0)]
        while left:
            tree, depth = left.pop()
            if isinstance(tree, str):
                yield INDENT * depth + tree
                continue
            waits = f", {_waits(tree.wait)}" if tree.wait else ""
            yield INDENT * depth + f"{tree.backend}{waits}"
            if tree.repeated:
                named = [str(row.activity_id) for row in tree.repeated[:MOST_NAMED]]
                if more := len(tree.repeated) - len(named):
                    named.append(f"{more} more")
                word = "waits" if len(tree.repeated) == 1 else "wait"
                left.append((f"{', '.join(named)} {word} for it, too (shown elsewhere)", depth + 1))
            left += [(waiter, depth + 1) for waiter in reversed(tree.waiters)]

    def in_json(self) -> dict[str, Any]:
        """The tree as nested objects; waiters that have another place are without their own waiters."""
        repeated = [
            {"pid": row.activity_id, "wait": _wait_in_json(row), "is_repeated": True} for row in self.repeated
        ]
        return {
            **self.backend.in_json(),
            "wait": self.wait and _wait_in_json(self.wait),
            "is_repeated": False,
            "waiters": [*(waiter.in_json() for waiter in self.waiters), *repeated],
        }


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps somebody waiting: a wait, who is in its way, and what keeps that one."""

    wait: Any
    blocker: Backend
    ahead: tuple[Obstacle, ...]

    def lines(self, depth: int) -> Iterator[str]:
        yield INDENT * depth + f"{self.wait.activity_id} {_waits(self.wait)}"
        yield INDENT * depth + f"behind {self.blocker}"
        for obstacle in self.ahead:
            yield from obstacle.lines(depth + 1)

    def in_json(self) -> dict[str, Any]:
        return {
            "pid": self.wait.activity_id,
            "wait": _wait_in_json(self.wait),
            "blocker": self.blocker.in_json() | {"waits": [one.in_json() for one in self.ahead]},
        }


@dataclass(frozen=True, slots=True)
class Cycle:
    """Waits of which each is behind the next one's backend, or behind another session of its task."""

    waits: tuple[Any, ...]

    @property
    def is_visible(self) -> bool:
        """Whether PostgreSQL sees the deadlock, which it does on one connection each."""
        return all(wait.blocking_activity_id == after.activity_id for wait, after in self._steps())

    def __str__(self) -> str:
        steps = [
            f"{wait.activity_id} waits for {wait.blocking_activity_id}"
            + (
                f" (of one task with {after.activity_id})"
                if wait.blocking_activity_id != after.activity_id
                else ""
            )
            for wait, after in self._steps()
        ]
        hint = "PostgreSQL will end it" if self.is_visible else "PostgreSQL does not see it: stop one of them"
        return f"cycle: {', '.join(steps)}; {hint}"

    def _steps(self) -> Iterable[tuple[Any, Any]]:
        return zip(self.waits, (*self.waits[1:], self.waits[0]), strict=True)


class Waits:
    """All waits in a database: each is a ``Wait``, or a row of ``BlockedPGLock``.

    ``application_names`` are those of all backends that could be other sessions of a waiter's task;
    ``tasks`` are the names and ids of tasks whose labels are to be believed. Both are by pid.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        application_names: Mapping[int, str],
        tasks: Mapping[int, tuple[str, str]],
    ) -> None:
        self._of_waiter: dict[Pid, list[Any]] = {}
        self._behind: dict[Pid, list[Any]] = {}
        self._activities: dict[Pid, Any] = {}
        for row in sorted(rows, key=_longest_first):
            self._of_waiter.setdefault(row.activity_id, []).append(row)
            self._behind.setdefault(row.blocking_activity_id, []).append(row)
            self._activities[row.activity_id] = row.activity
            self._activities[row.blocking_activity_id] = row.blocking_activity
        self._task_of: dict[Pid, str] = {}
        self._sessions: dict[str, list[int]] = {}
        for pid, name in sorted(application_names.items()):
            if task_id := labels.task_id_of(name):
                self._task_of[pid] = task_id
                self._sessions.setdefault(task_id, []).append(pid)
        self._tasks = tasks
        self._names = {self._task_of[pid]: task for pid, task in tasks.items() if pid in self._task_of}
        self.cycles = self._find_cycles()
        self._in_cycles = {
            pid
            for cycle in self.cycles
            for wait in cycle.waits
            for pid in (wait.activity_id, wait.blocking_activity_id)
        }

    def roots(self) -> list[Pid]:
        """Who blocks others and waits for nobody, and one of each cycle; those with most behind first."""
        roots = [pid for pid in self._behind if pid not in self._of_waiter]
        reached = self._reached(roots)
        for pid in self._behind:
            if pid not in reached:
                root = self._in_cycle_before(pid)
                roots.append(root)
                reached |= self._reached([root])
        return sorted(roots, key=lambda root: (-len(self._reached([root])), root or 0))

    def holds_up(self, root: Pid, pids: Iterable[int]) -> bool:
        """Whether one of these backends is this root, or behind it."""
        return not self._reached([root]).isdisjoint(pids)

    def behind(self, root: Pid) -> tuple[int, timedelta]:
        """How many backends wait behind this one, and how long the first of them does."""
        waiters = self._reached([root]) - {root}
        waits = [row.wait_duration or timedelta() for pid in waiters for row in self._of_waiter[pid]]
        return len(waiters), max(waits, default=timedelta())

    def trees(self, roots: Sequence[Pid]) -> list[Tree]:
        """The trees of these roots. Everybody has one place, as near to a root as can be."""
        # A queue of n waiters has n * n / 2 waits: each is behind all before it.
        below: dict[Pid, list[Any]] = {}
        repeated: dict[Pid, list[Any]] = {}
        place_of = {root: next(iter(self._of_waiter.get(root, ())), None) for root in roots}
        left = deque(roots)
        while left:
            pid = left.popleft()
            for row in self._behind.get(pid, ()):
                if row.activity_id in place_of:
                    repeated.setdefault(pid, []).append(row)
                else:
                    place_of[row.activity_id] = row
                    below.setdefault(pid, []).append(row)
                    left.append(row.activity_id)
        trees: dict[Pid, Tree] = {}
        for pid in reversed(place_of):
            waiters = tuple(trees[row.activity_id] for row in below.get(pid, ()))
            trees[pid] = Tree(self._backend(pid), place_of[pid], waiters, tuple(repeated.get(pid, ())))
        return [trees[root] for root in roots]

    def obstacles(self, pid: Pid) -> tuple[Obstacle, ...]:
        """What a backend waits for, or the other sessions of its task, up to the roots.

        Everybody who is in the way is there once, as near as can be.
        """
        # In a queue of n waiters each is behind all before it.
        rows_of: dict[Pid, list[Any]] = {}
        shown = set(self._team(pid))
        left: deque[Pid] = deque([pid])
        while left:
            one = left.popleft()
            for row in self._waits_of_team(one):
                if row.blocking_activity_id not in shown:
                    shown.update(self._team(row.blocking_activity_id))
                    rows_of.setdefault(one, []).append(row)
                    left.append(row.blocking_activity_id)
        found: dict[Pid, tuple[Obstacle, ...]] = {}
        for one in reversed(rows_of):
            found[one] = tuple(
                Obstacle(
                    row, self._backend(row.blocking_activity_id), found.get(row.blocking_activity_id, ())
                )
                for row in rows_of[one]
            )
        return found.get(pid, ())

    def _team(self, pid: Pid) -> Sequence[Pid]:
        return self._sessions[self._task_of[pid]] if pid in self._task_of else [pid]

    def _backend(self, pid: Pid) -> Backend:
        name, task_id = "", ""
        if pid is not None:
            task_id = self._task_of.get(pid, "")
            name, task_id = self._tasks.get(pid) or self._names.get(task_id) or ("", task_id)
        others = tuple(one for one in self._team(pid) if one is not None and one != pid)
        return Backend(pid, self._activities.get(pid), name, task_id, others, pid in self._in_cycles)

    def _reached(self, roots: Iterable[Pid]) -> set[Pid]:
        reached = set(roots)
        left = list(reached)
        while left:
            for row in self._behind.get(left.pop(), ()):
                if row.activity_id not in reached:
                    reached.add(row.activity_id)
                    left.append(row.activity_id)
        return reached

    def _in_cycle_before(self, pid: Pid) -> Pid:
        seen = set()
        while pid not in seen:
            seen.add(pid)
            pid = self._of_waiter[pid][0].blocking_activity_id
        return pid

    def _find_cycles(self) -> list[Cycle]:
        found: list[Cycle] = []
        done: set[Pid] = set()
        for pid in self._of_waiter:
            first = self._team(pid)[0]
            path = {first: 0}
            waits: list[Any] = []
            left = [self._waits_of_team(first)]
            while left and first not in done:
                row = next(left[-1], None)
                if row is None:
                    left.pop()
                    done.add(path.popitem()[0])
                    if waits:
                        waits.pop()
                    continue
                after = self._team(row.blocking_activity_id)[0]
                if after in path:
                    found.append(Cycle((*waits[path[after] :], row)))
                elif after not in done:
                    path[after] = len(path)
                    waits.append(row)
                    left.append(self._waits_of_team(after))
        return _apart(found)

    def _waits_of_team(self, pid: Pid) -> Iterator[Any]:
        return iter([row for one in self._team(pid) for row in self._of_waiter.get(one, ())])


def _apart(cycles: Iterable[Cycle]) -> list[Cycle]:
    """Those that share no waiter with one before: a tangle has more cycles than anybody would read."""
    waiters: set[int] = set()
    kept = []
    for cycle in cycles:
        pids = {wait.activity_id for wait in cycle.waits}
        if waiters.isdisjoint(pids):
            kept.append(cycle)
            waiters |= pids
    return kept


def _longest_first(row: Any) -> tuple[timedelta, int]:
    return (-(row.wait_duration or timedelta()), row.activity_id)


def _waits(row: Any) -> str:
    return f"waits {one_line(row.wait_duration)} for {wordings.lock(row)}"


def _wait_in_json(row: Any) -> dict[str, Any]:
    attributes = (
        "type",
        "mode",
        "name",
        "rel_name",
        "classid",
        "objid",
        "objsubid",
        "wait_start",
        "wait_duration",
    )
    return {attribute: in_json(getattr(row, attribute)) for attribute in attributes}
