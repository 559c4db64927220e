"""Nodes that are processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP, SIGKILL, SIGTERM, Signals, default_int_handler, signal

import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    RedisTestBackend,
    RedisTestBroker,
)

from example_project import servers
from example_project.cluster import workers
from example_project.processes import PROJECT

START_SECONDS = 60.0


class Process:
    """What pytest-celery asks of a container, answered by a process with a group of its own."""

    ready_prompt: str

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self.name = name
        self.id = uuid.uuid4().hex
        self.environment = environment
        self.log = folder / f"{name}.log"
        self.log.touch()
        self._start()

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def status(self) -> str:
        return "running" if self.process.poll() is None else "exited"

    def logs(self) -> str:
        """All of it, also from before a restart."""
        return self.log.read_text(errors="replace")

    def ready(self) -> bool:
        give_up = time.monotonic() + START_SECONDS
        while self.ready_prompt not in self.logs()[self.starts_at :]:
            assert self.status == "running", f"{self.name} has ended:\n{self.logs()}"
            assert time.monotonic() < give_up, f"{self.name} is not ready:\n{self.logs()}"
            time.sleep(0.05)
        return True

    def kill(self, signal: str | int = "SIGKILL") -> None:
        number = Signals[signal] if isinstance(signal, str) else Signals(signal)
        if number is SIGKILL:
            self._kill_all()
        else:
            self.process.send_signal(number)

    def restart(self, timeout: float = 10) -> None:
        self._stop(timeout)
        self._start()
        self.ready()

    def reload(self) -> None:
        """Nothing has to be: what is asked of a process is never remembered."""

    def teardown(self) -> None:
        # As containers are removed: nobody waits for their end.
        self._kill_all()
        # pytest shows it where the test has failed.
        print(f"{self.name}:\n{self.logs()}")

    def _start(self) -> None:
        self.starts_at = len(self.logs())
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for the tests, which end their nodes themselves.
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=PROJECT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def _stop(self, timeout: float) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        self._kill_all()

    def _kill_all(self) -> None:
        """As a container takes along everything that runs in it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, SIGKILL)
        self.process.wait()


class RedisProcess(Process):
    ready_prompt = "Ready to accept connections"

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        self.port = servers.free_port()
        super().__init__(name, folder)

    def command(self) -> list[str]:
        command = servers.redis_command(self.port, self.folder)
        if command is None:
            pytest.exit("The cluster needs a Redis: install redis-server.", 4)
        return command

    @property
    def celeryconfig(self) -> dict[str, str]:
        url = f"redis://127.0.0.1:{self.port}/0"
        return {"url": url, "host_url": url}


class WorkerProcess(Process):
    ready_prompt = " ready."

    def command(self) -> list[str]:
        # What CeleryTestWorker takes for the name of the host.
        host = self.id[:12]
        return [sys.executable, "-m", *workers.command(f"{self.name}@{host}", self.name)]

    def worker_name(self) -> str:
        return self.name

    def worker_queue(self) -> str:
        return self.name


@pytest.fixture(scope="session", autouse=True)
def _ends_politely() -> None:
    """Tests that are told to end stop their nodes, as after Ctrl-C."""
    for number in (SIGHUP, SIGTERM):
        signal(number, default_int_handler)


@pytest.fixture(scope="session")
def database() -> Iterator[dict[str, str]]:
    """The one in ``DATABASE_URL``, or an embedded one."""
    if url := os.environ.get("DATABASE_URL"):
        yield {"url": url, "host_url": url}
        return
    with tempfile.TemporaryDirectory(prefix="pglock-") as folder:
        # Where root runs this, the server is somebody else's.
        Path(folder).chmod(0o755)
        with servers.postgresql(os.environ.get("PG", "18"), Path(folder)) as url:
            yield {"url": url, "host_url": url}


@pytest.fixture
def celery_broker_cluster(tmp_path: Path) -> Iterator[CeleryBrokerCluster]:
    node = RedisTestBroker(RedisProcess("broker", tmp_path))
    try:
        node.ready()
        yield CeleryBrokerCluster(node)
    finally:
        node.teardown()


@pytest.fixture
def celery_backend_cluster(tmp_path: Path) -> Iterator[CeleryBackendCluster]:
    node = RedisTestBackend(RedisProcess("backend", tmp_path))
    try:
        node.ready()
        yield CeleryBackendCluster(node)
    finally:
        node.teardown()


@pytest.fixture
def celery_worker_cluster(
    tmp_path: Path, worker_environment: dict[str, str]
) -> Iterator[CeleryWorkerCluster]:
    nodes = [
        CeleryTestWorker(WorkerProcess(name, tmp_path, **worker_environment), app=None)
        for name in workers.NAMES
    ]
    try:
        cluster = CeleryWorkerCluster(*nodes)
        cluster.ready()
        yield cluster
    finally:
        for node in nodes:
            node.teardown()
