"""Servers of a test's own, which it may break: a PostgreSQL with standbys, a PgBouncer, a Redis."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psycopg

from example_project import servers

if TYPE_CHECKING:
    from typing_extensions import Self

# How the postmaster is told to stop, by the names that pg_ctl has for it.
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


def version_of_the_tests() -> str:
    """The embedded PostgreSQL that is nearest to the server that the tests run against."""
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        major = connection.info.server_version // 10000
    return min(servers.POSTGRESQL_FOLDERS, key=lambda version: abs(int(version) - major))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pglock-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # Where root runs the tests, the servers run as somebody else.
        folder.chmod(0o755)
        yield folder


class _Server:
    """Runs from ``with`` on, on one port; all that it needs ends with the block, or if entering fails."""

    port: int
    process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            folder = resources.enter_context(_folder())
            self._running = resources.enter_context(ExitStack())
            self.port = servers.free_port()
            self._prepare(folder)
            self.start()
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def url(self) -> str:
        return servers.postgresql_url(self.port)

    def start(self) -> None:
        self.process = self._running.enter_context(self._serving())

    def stop(self) -> None:
        self._running.close()

    def _prepare(self, folder: Path) -> None:
        raise NotImplementedError

    def _serving(self) -> AbstractContextManager[subprocess.Popen[bytes]]:
        raise NotImplementedError


class Cluster(_Server):
    """A PostgreSQL cluster with settings of its own; ``process`` is its postmaster.

    ``version`` is one that example_project embeds; unnamed it is the one that the tests run against.
    """

    def __init__(self, version: str | None = None, **settings: str) -> None:
        self.version = version or version_of_the_tests()
        self._settings = settings

    def _prepare(self, folder: Path) -> None:
        self._home, self._user = servers.readable_postgresql(self.version, folder)
        self._data = folder / "postgresql"
        servers.initialize(self._home, self._data, self._user)

    def _serving(self) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return servers.serving(self._home, self._data, self.port, self._user, **self._settings)

    @property
    def log(self) -> str:
        """All that it has logged."""
        return self._data.with_name(f"{self._data.name}.log").read_text(errors="replace")

    def stop(self, mode: str = "fast") -> None:
        """Stop it as ``pg_ctl`` would: "immediate" is a crash, and "smart" waits for the clients to leave.

        Whom it waits for in vain is thrown out after a while.
        """
        self.process.send_signal(STOP_SIGNALS[mode])
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(servers.STOP_SECONDS)
        super().stop()

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    @contextmanager
    def standby(self) -> Iterator[Standby]:
        """A hot standby that streams from this cluster."""
        with Standby(self) as standby:
            yield standby


class Standby(Cluster):
    """A hot standby of another cluster, until it is promoted."""

    def __init__(self, primary: Cluster) -> None:
        super().__init__(primary.version, **primary._settings)
        self._primary = primary

    def _prepare(self, folder: Path) -> None:
        self._home, self._user = self._primary._home, self._primary._user
        self._data = folder / "standby"
        servers.own_folder(self._data, self._user)
        command: list[str | Path] = [self._home / "bin" / "pg_basebackup", "-d", self._primary.url]
        command += ["-D", self._data, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        subprocess.run(command, check=True, cwd=folder, **servers.as_user(self._user))
        self._data.chmod(0o700)

    def promote(self) -> None:
        """Make it a primary; returns when it takes writes."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)


def pgbouncer_program() -> str | None:
    """Debian installs it where the PATH of ordinary users does not lead."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


class PgBouncer(_Server):
    """A PgBouncer before the PostgreSQL that listens on a port.

    ``mode`` is "transaction" or "session", ``pool_size`` how many server sessions it keeps for a database.
    Whoever connects to it becomes ``user`` there.
    """

    def __init__(
        self,
        port_of_postgres: int,
        mode: str = "transaction",
        pool_size: int = 10,
        *,
        host: str = "127.0.0.1",
        user: str = "postgres",
        password: str = "",
    ) -> None:
        self._settings = {
            "listen_addr": "127.0.0.1",
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": mode,
            "default_pool_size": str(pool_size),
            "max_client_conn": "200",
            # Seconds: a server that was down is looked for again at once.
            "server_login_retry": "0.1",
        }
        self._database = f"* = host={host} port={port_of_postgres} user={user}"
        if password:
            self._database += f" password={password}"

    def _prepare(self, folder: Path) -> None:
        lines = [f"{name} = {value}" for name, value in {**self._settings, "listen_port": self.port}.items()]
        self._ini = folder / "pgbouncer.ini"
        self._ini.write_text("\n".join(["[databases]", self._database, "[pgbouncer]", *lines, ""]))

    def _serving(self) -> AbstractContextManager[subprocess.Popen[bytes]]:
        program = pgbouncer_program()
        assert program, "pgbouncer is not installed: apt-get install pgbouncer"
        # It refuses to run as root.
        user = servers.as_user(pwd.getpwnam("nobody") if os.geteuid() == 0 else None)
        log = self._ini.with_suffix(".log")
        return servers.server([program, self._ini], log, self._answers, stop=signal.SIGTERM, **user)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextmanager
def broker() -> Iterator[str]:
    """An empty Redis; gives its URL."""
    with _folder() as folder, servers.broker(folder) as url:
        yield url
