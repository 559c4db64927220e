"""Rivals, workers and patience."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from django.conf import settings
from django.core import mail
from django.db import connection
from django.test import TransactionTestCase
from django.test.utils import override_settings

from celery_pglock.keys import Identifier, Key, key
from celery_pglock.pool import close_leftovers, pool

PATIENCE = 20.0

# Advisory locks of this database: the tests' server may have others.
ADVISORY_HERE = (
    "locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


# After each of its tests Django empties the tables of all apps and makes their permissions anew. What has no
# use for the admin does without its tables: twice as fast.
TransactionTestCase.available_apps = settings.APPS


class ReentrantPubSub(redis.client.PubSub):
    """As newer ones: a result of Celery's that is collected unsubscribes in the middle of a subscription."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lock = threading.RLock()


def pytest_configure(config: pytest.Config) -> None:
    # Without it the tests stand still for ever with the redis-py that the oldest Celery wants.
    redis.client.PubSub = ReentrantPubSub  # type: ignore[misc]
    # Those that run the tests side by side need it themselves.
    if settings.ROOM or not config.getoption("numprocesses", None):
        os.environ["WITHOUT_THE_ADMIN"] = "yes"
    # In the background of a shell Ctrl-C is ignored, and would be by the processes that tests start and stop.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not settings.BROKER.startswith("redis"):
        pytest.exit("The tests need a Redis: name one in CELERY_BROKER_URL, or install redis-server.", 4)
    if settings.ROOM:
        with redis.from_url(settings.BROKER) as client:
            client.execute_command(
                "ACL", "SETUSER", settings.ROOM, "reset", "on", f">{settings.ROOM}", "~*", "&*", "+@all"
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Side by side file after file is taken: begun last, a long one would keep all waiting at the end.
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


LOCK_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pglock%%'"
    " AND datname = current_database()"
)


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = PATIENCE) -> Any:
    """Poll until the condition holds, and give what it gave."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > give_up:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.02)
    return found


def in_another_thread(function: Callable[[], Any]) -> Any:
    """What the function gave there."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


class Rival:
    """Somebody else, on a connection of his own."""

    def __init__(self) -> None:
        parameters = connection.get_connection_params()
        parameters |= {"cursor_factory": None, "context": None, "autocommit": True}
        self.connection = psycopg.connect(**parameters)

    def ask(self, sql: str, *parameters: object) -> Any:
        row = self.connection.execute(sql, parameters).fetchone()
        return row and row[0]

    def _call(self, function: str, identifier: Identifier | Key) -> Any:
        lock = identifier if isinstance(identifier, Key) else key(identifier)
        return self.ask(f"SELECT {function}({', '.join(['%s'] * len(lock.arguments))})", *lock.arguments)

    def take(self, identifier: Identifier | Key, *, shared: bool = False) -> bool:
        return bool(self._call(f"pg_try_advisory_lock{'_shared' if shared else ''}", identifier))

    def give_back(self, identifier: Identifier | Key, *, shared: bool = False) -> bool:
        return bool(self._call(f"pg_advisory_unlock{'_shared' if shared else ''}", identifier))

    def could_take(self, identifier: Identifier | Key, *, shared: bool = False) -> bool:
        return self.take(identifier, shared=shared) and self.give_back(identifier, shared=shared)

    def sees_held(self, identifier: Identifier | Key, *, granted: bool = True) -> int:
        lock = identifier if isinstance(identifier, Key) else key(identifier)
        return int(
            self.ask(
                f"SELECT count(*) FROM pg_locks WHERE {ADVISORY_HERE} AND granted = %s AND objsubid = %s"
                " AND classid::bigint = %s AND objid::bigint = %s",
                granted,
                lock.objsubid,
                lock.classid,
                lock.objid,
            )
        )

    def sees_advisory_locks(self) -> int:
        return int(self.ask(f"SELECT count(*) FROM pg_locks WHERE {ADVISORY_HERE}"))


@pytest.fixture
def rival(transactional_db: None) -> Iterator[Rival]:
    somebody = Rival()
    yield somebody
    somebody.connection.close()


@pytest.fixture(autouse=True)
def _no_lock_survives_a_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "transactional_db" in request.fixturenames:
        leased = [session for session in pool().leased.values() if not session.holds_nothing]
        close_leftovers("the test")
        assert not leased, "the test leaves locks behind"


@pytest.fixture
def pooled(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As outside of tests: idle sessions are kept for the next lock."""
    monkeypatch.delattr(mail, "outbox", raising=False)
    yield
    pool().close_idle()


class Worker:
    """A real worker in a process of its own, and what it logged."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, queue: str) -> None:
        self.process = process
        self.log_file = log
        self.queue = queue

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")


@contextmanager
def running_worker(
    queue: str, *options: str, pool: str = "prefork", concurrency: int = 2, **variables: str
) -> Iterator[Worker]:
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        command = [sys.executable, "-m", "celery", "-A", "tests.celery_app", "worker", f"--pool={pool}"]
        command += [
            f"--concurrency={concurrency}",
            "-Q",
            queue,
            "-l",
            "INFO",
            "-n",
            f"{queue}@test",
            *options,
        ]
        command += ["--without-gossip", "--without-mingle"]
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "TEST_DATABASE_NAME": connection.settings_dict["NAME"], **variables},
        )
        worker = Worker(process, Path(log.name), queue)
        try:
            wait_until(lambda: " ready." in worker.log or process.poll() is not None, "the worker is ready")
            assert process.poll() is None, f"exit code {process.returncode}: {worker.log}"
            yield worker
        finally:
            # How workers end politely is the claim of other tests.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


@pytest.fixture(scope="module")
def _shared_worker(django_db_setup: None, django_db_blocker: Any) -> Iterator[Worker]:
    from tests.celery_app import app

    with django_db_blocker.unblock():
        app.control.purge()
        with running_worker("celery", pool="prefork", concurrency=8) as worker:
            yield worker


@pytest.fixture
def worker(_shared_worker: Worker, transactional_db: None) -> Worker:
    """A prefork worker with eight processes, shared by tests that do it no harm."""
    return _shared_worker


@pytest.fixture
def pglock_settings() -> Iterator[Callable[..., Any]]:
    """Sets keys of CELERY_PGLOCK for one test."""
    with override_settings():

        def change(**values: Any) -> None:
            settings.CELERY_PGLOCK = {**settings.CELERY_PGLOCK, **values}

        yield change


@pytest.fixture
def broker() -> Iterator[Any]:
    """The tests' Redis, which can be told to answer NOPERM to LPUSH, by which a message is sent."""
    user = settings.ROOM or "default"
    with redis.from_url(settings.CELERY_BROKER_URL) as client:

        @contextmanager
        def refuses_messages() -> Iterator[None]:
            client.execute_command("ACL", "SETUSER", user, "-lpush")
            try:
                yield
            finally:
                client.execute_command("ACL", "SETUSER", user, "+lpush")

        client.refuses_messages = refuses_messages
        yield client
        client.execute_command("ACL", "SETUSER", user, "+lpush")
