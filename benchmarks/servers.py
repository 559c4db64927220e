"""The PostgreSQL and the Redis of a run, which start with it and end with it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from example_project import servers

# Durability is not measured; deadlock_timeout is PostgreSQL's own default, unlike the example's.
SETTINGS = {"max_connections": "500", "deadlock_timeout": "1s", "synchronous_commit": "on"}


@contextlib.contextmanager
def postgresql(version: str, **settings: str) -> Iterator[str]:
    """A new PostgreSQL of this major version, with these settings; gives its URL."""
    with _folder() as folder:
        home, user = servers.readable_postgresql(version, folder)
        data = folder / "postgresql"
        servers.initialize(home, data, user)
        port = servers.free_port()
        with servers.serving(home, data, port, user, **{**SETTINGS, **settings}):
            yield servers.postgresql_url(port)


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """An empty Redis; gives its URL."""
    with _folder() as folder, servers.broker(folder) as url:
        if not url.startswith("redis:"):
            raise SystemExit("The benchmarks need a Redis: install redis-server.")
        yield url


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pglock-") as name:
        folder = Path(name)
        # PostgreSQL does not run as root, and must get at its files.
        folder.chmod(0o755)
        yield folder
