"""All that takes part in a run under fault: servers, proxies, workers, and whoever looks on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psycopg

from tests.faults.histories import Event, Journal, Tail, now
from tests.faults.messages import Messages
from tests.faults.proxy import Proxy
from tests.faults.workers import PROJECT, Worker, Workers
from tests.servers import Cluster, broker

if TYPE_CHECKING:
    from typing_extensions import Self

NUMBER_OF_WORKERS = 2
CHILDREN = 3

# Seconds after which the broker delivers again what nobody has acknowledged.
VISIBILITY_TIMEOUT = 6

# How often it is tried to find a moment in which a worker can be killed.
MOMENTS = 40

LOOK_EVERY = 0.05
STALL = 0.05

# There is usually somebody who waits for each key, and never a crowd.
MOST_MESSAGES = 4
SENDS_PER_SECOND = 4.0

# Seconds that a body takes: some outlast the silence after which a holder gives up.
SHORT = (0.2, 1.5)
LONG = (2.0, 4.5)
LONG_ONES = 0.25

# The share of bodies that ask before each step whether the lock is still theirs.
ASK = 0.7

HELD = """
SELECT classid::bigint, objid::bigint, pid FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
"""

# Stamped by the server at the COMMIT of whoever writes; each table tells in which order.
LOGS = """
CREATE TABLE faults_committed (
    id bigserial, key text, timeline bigint, number bigint, at double precision
);
CREATE FUNCTION faults_commit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.faults_committed (key, timeline, number, at)
    VALUES (new.key, new.timeline, new.number, extract(epoch FROM clock_timestamp()));
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER committed AFTER UPDATE ON faults_ledger
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION faults_commit();

CREATE TABLE faults_given (
    id bigserial, classid bigint, objid bigint, timeline bigint, number bigint, at double precision
);
CREATE FUNCTION faults_give() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR (new.timeline, new.number) <> (old.timeline, old.number) THEN
        INSERT INTO public.faults_given (classid, objid, timeline, number, at)
        VALUES (new.classid, new.objid, new.timeline, new.number, extract(epoch FROM clock_timestamp()));
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER given AFTER INSERT OR UPDATE ON celery_pglock_keystate
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION faults_give();
"""


@dataclass(frozen=True)
class Holder:
    """Who is in a body now, by the journal; and the session that holds the key, by ``pg_locks``."""

    key: str
    attempt: str
    task: str
    process: int
    backend: int | None
    worker: int
    ends_at: float


class Stage:
    """Runs from ``with`` on; leaving it ends every process that it started."""

    def __init__(
        self, mode: str, seed: int, folder: Path, *, lease: float, version: str, most_messages: int
    ) -> None:
        self.mode = mode
        self.lease = lease
        self.version = version
        self.folder = folder
        # So many messages for each key are under way at once.
        self.most_messages = most_messages
        self.path = folder / "history.jsonl"
        self.journal = Journal(self.path)
        self.random = random.Random(f"{seed} sends")
        self.sent: dict[str, str] = {}
        self._finished: set[str] = set()
        self.backends: dict[str, int] = {}
        self.children: dict[int, int] = {}
        self._holders: dict[str, Event] = {}
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            self.cluster = resources.enter_context(Cluster(self.version))
            broker_url = resources.enter_context(broker())
            self.messages = Messages(broker_url)
            resources.callback(self.messages.close)
            self.work_path = resources.enter_context(Proxy(self.cluster.port))
            # Each worker has a way of its own to the locks: one may be cut off, and another not.
            self.locks_paths = [
                resources.enter_context(Proxy(self.cluster.port)) for _ in range(NUMBER_OF_WORKERS)
            ]
            environment = {
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
                "PYTHONPATH": str(PROJECT),
                "FAULTS_MODE": self.mode,
                "FAULTS_LEASE": str(self.lease),
                "FAULTS_JOURNAL": str(self.path),
                "FAULTS_WORK_URL": self._through(self.work_path),
                "FAULTS_LOCKS_URL": self._through(self.locks_paths[0]),
                "FAULTS_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT),
            }
            os.environ.update({**environment, "CELERY_BROKER_URL": self.messages.url})
            environment["CELERY_BROKER_URL"] = broker_url
            self._migrate(environment)
            self._prepare_work()
            self.tail = Tail(self.path)
            resources.callback(self.tail.close)
            self.workers = resources.enter_context(
                Workers(
                    CHILDREN,
                    self.folder,
                    [{**environment, "FAULTS_LOCKS_URL": self._through(path)} for path in self.locks_paths],
                )
            )
            self._wall_clock = now() - time.time()
            for work in (self._observe, self._send):
                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                resources.callback(thread.join, 10)
            resources.callback(self._stop.set)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of our own to the server, apart from the proxies."""
        return psycopg.connect(self.cluster.url, autocommit=True, connect_timeout=2)

    def tick(self) -> None:
        """Read what has happened, and look after the workers; does not wait."""
        for event in self.tail.events():
            if event.what == "attempt":
                self._holders[event["attempt"]] = event
            elif event.what == "ended":
                self._holders.pop(event["attempt"], None)
            elif event.what == "child":
                self.children[event.process] = self._number_of(event["worker"])
        for attempt, event in list(self._holders.items()):
            if not _runs(event.process):
                del self._holders[attempt]
        for worker in self.workers.all:
            if worker.is_overdue:
                self._kill_who_does_not_end(worker)
            if news := worker.revive():
                self.journal.write("worker", text=news)

    def holders(self) -> list[Holder]:
        """Of each key the one who entered last."""
        latest = {event["key"]: event for event in self._holders.values()}
        return [
            Holder(
                key=key,
                attempt=event["attempt"],
                task=event["task"],
                process=event.process,
                backend=self.backends.get(key),
                worker=self.children.get(event.process, 0),
                ends_at=event.at + event["seconds"],
            )
            for key, event in sorted(latest.items())
        ]

    @property
    def keys(self) -> tuple[str, ...]:
        keys: tuple[str, ...] = self._work.KEYS
        return keys

    @property
    def someone_works(self) -> bool:
        return bool(self._holders)

    def come_to_rest(self) -> None:
        """Send nothing more, and heal all that may still be broken."""
        self._is_sending = False
        self.messages.accept()
        self.work_path.heal()
        for path in self.locks_paths:
            path.heal()
        for child in self.children:
            if _runs(child):
                os.kill(child, signal.SIGCONT)

    def send(self, key: str, seconds: float, **options: Any) -> None:
        """Send one message, of whichever kind the mode's mix gives."""
        mix = self._work.MIX[self.mode]
        (task,) = self.random.choices(list(mix), list(mix.values()))
        asks = self.random.random() < ASK
        name = f"{self.random.getrandbits(64):016x}"
        self.journal.write("sent", task=name, kind=task.name, key=key, **options)
        task.apply_async([key, seconds, asks], task_id=name, **options)
        self.sent[name] = key

    def unfinished(self) -> list[str]:
        """Those sent whose end nobody has recorded."""
        asked = [task for task in list(self.sent) if task not in self._finished]
        outcomes = self.messages.outcomes(asked)
        self._finished.update(task for task, recorded in outcomes.items() if _is_final(recorded))
        return [task for task in asked if task not in self._finished]

    def kill(self, worker: Worker) -> list[str]:
        """Kill a worker in a moment in which Celery itself loses nothing.

        Between the moment in which Redis gives out a message and the worker's note that it has it, who is
        killed loses it. Answers which messages seem to be on that way, if such a moment does not come.
        """
        for _ in range(MOMENTS):
            with self.messages.paused():
                os.kill(worker.process.pid, signal.SIGSTOP)
                queued, in_hand = self.messages.where()
                on_the_way = set(self.unfinished()) - queued - in_hand
                if not on_the_way:
                    worker.kill()
                    return []
                os.kill(worker.process.pid, signal.SIGCONT)
            time.sleep(0.02)
        return sorted(on_the_way)

    def redeliver(self, visibility_timeout: float | None = None) -> None:
        self.messages.restore(self._work.app, visibility_timeout)

    def revoke(self, task: str) -> None:
        self._work.app.control.revoke(task, terminate=True, signal="SIGTERM")

    def note_what_became_of_all(self) -> None:
        """Write the ends of all messages, and what the server kept of tokens and writes, into the history."""
        sent = list(self.sent)
        outcomes = self.messages.outcomes(sent)
        queued, in_hand = self.messages.where()
        for task in sent:
            recorded = outcomes.get(task)
            if recorded is not None and _is_final(recorded):
                outcome = _what_became(recorded)
            else:
                outcome = "queued" if task in queued | in_hand else "lost"
            state = recorded["status"] if recorded else None
            self.journal.write("outcome", task=task, outcome=outcome, state=state)
        if self.mode == "naive":
            return
        with self.connect() as connection:
            for table, what in (("given", "given"), ("committed", "committed")):
                for row in connection.execute(f"SELECT * FROM faults_{table} ORDER BY id").fetchall():
                    *_, timeline, number, at = row
                    key = row[1] if table == "committed" else self._names.get((row[1], row[2]), "?")
                    self.journal.write(
                        what, key=key, token=[timeline, number], committed_at=at + self._wall_clock
                    )

    def note_leaks(self, patience: float) -> None:
        """Wait until no advisory lock and no lock session is left, and write down what does not go."""
        give_up = time.monotonic() + patience
        with self.connect() as connection:
            while left := connection.execute(
                "SELECT 'advisory lock ' || classid || ',' || objid || ' of backend ' || pid FROM pg_locks"
                " WHERE locktype = 'advisory'"
                " UNION ALL SELECT 'session ' || pid || ' ' || application_name || ' ' || query"
                " FROM pg_stat_activity WHERE application_name LIKE 'pglock%'"
            ).fetchall():
                if time.monotonic() > give_up:
                    for (text,) in left:
                        self.journal.write("left behind", text=text)
                    return
                self.tick()
                time.sleep(0.1)

    def _number_of(self, process: int) -> int:
        return next((worker.number for worker in self.workers.all if worker.has_been(process)), 0)

    def _kill_who_does_not_end(self, worker: Worker) -> None:
        worker.tell_where_it_is()
        time.sleep(1)
        self.journal.write("worker", text=f"{worker.name} did not end in time, and was killed")
        if on_the_way := self.kill(worker):
            worker.kill()
            self.journal.write("lost with a worker", tasks=on_the_way)

    def _through(self, proxy: Proxy) -> str:
        return f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres"

    def _migrate(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity", "0"]
        subprocess.run(command, check=True, cwd=PROJECT, env=environment)
        with self.connect() as connection:
            connection.execute(LOGS)

    def _prepare_work(self) -> None:
        # The settings are read when this is imported, and the environment names the servers only now.
        from tests.faults import work

        self._work = work
        self._is_sending = True
        self._names = {
            (key.classid, key.objid): name for name, key in ((name, work.key_of(name)) for name in work.KEYS)
        }
        with self.connect() as connection:
            for name in work.KEYS:
                connection.execute(
                    "INSERT INTO faults_ledger (key, timeline, number, writes) VALUES (%s, 0, 0, 0)", [name]
                )

    def _observe(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        expected = now() + LOOK_EVERY
        while not self._stop.wait(LOOK_EVERY):
            late = now() - expected
            if late > STALL:
                # Everybody was held up, or nobody knows who was not.
                self.journal.write("stall", seconds=late)
            try:
                if connection is None or connection.closed:
                    connection = self.connect()
                rows = connection.execute(HELD).fetchall()
            except psycopg.Error:
                # The server is down, or gone for a while.
                if connection is not None:
                    connection.close()
                rows = None
            expected = now() + LOOK_EVERY
            if rows is not None:
                self._note_changes({self._names.get(row[:2], "?"): row[2] for row in rows})
        if connection is not None:
            connection.close()

    def _note_changes(self, backends: dict[str, int]) -> None:
        before, self.backends = self.backends, backends
        for key, backend in before.items():
            if backends.get(key) != backend:
                self.journal.write("freed", key=key, backend=backend)
        for key, backend in backends.items():
            if before.get(key) != backend:
                self.journal.write("held", key=key, backend=backend)

    def _send(self) -> None:
        while not self._stop.wait(self.random.expovariate(SENDS_PER_SECOND)):
            if not self._is_sending:
                continue
            unfinished = Counter(self.sent[task] for task in self.unfinished())
            if keys := [key for key in self.keys if unfinished[key] < self.most_messages]:
                shortest, longest = LONG if self.random.random() < LONG_ONES else SHORT
                seconds = round(self.random.uniform(shortest, longest), 2)
                self.send(self.random.choice(keys), seconds)


def _is_final(recorded: dict[str, Any]) -> bool:
    return recorded["status"] in ("SUCCESS", "FAILURE", "REVOKED")


def _what_became(recorded: dict[str, Any]) -> str:
    if recorded["status"] != "SUCCESS":
        return "failed"
    return "skipped" if recorded["result"] == "skipped" else "done"


def _runs(process: int) -> bool:
    with suppress(OSError), open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False
