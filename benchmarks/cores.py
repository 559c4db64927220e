"""Which processor cores a run is measured on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import redis

from benchmarks.tables import Scale

NOTE = "The servers have one core for themselves, and whoever asks has another."


@contextlib.contextmanager
def apart(scale: Scale) -> Iterator[bool]:
    """Keep the servers on one core, and whoever starts in the block on another; whether that can be done.

    Otherwise it changes from turn to turn whether a question has to wake up a core, which costs more than all
    the rest.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if len(cores) < 2:
        yield False
        return
    servers = _servers(scale)
    try:
        _keep_on(servers, cores[:1])
        os.sched_setaffinity(0, cores[1:2])
        yield True
    finally:
        os.sched_setaffinity(0, cores)
        _keep_on(servers, cores)


def _keep_on(servers: list[int], cores: list[int]) -> None:
    for server in servers:
        for process in (server, *_children(server)):
            # A backend may end at any moment.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process, cores)


def _servers(scale: Scale) -> list[int]:
    with psycopg.connect(scale.database_url) as connection:
        row = connection.execute("SELECT current_setting('data_directory')").fetchone()
    assert row is not None
    postmaster = int((Path(row[0]) / "postmaster.pid").read_text().splitlines()[0])
    with redis.from_url(scale.redis_url) as client:
        return [postmaster, int(client.info("server")["process_id"])]


def _children(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in children.read_text().split()]
