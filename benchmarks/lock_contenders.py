"""The locks that are compared: each function connects, and gives what takes and gives back so many times."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.django_settings import cursor as djangos_cursor
from benchmarks.django_settings import set_up
from benchmarks.rounds import ContenderFailed

Run = Callable[[int], None]

KEY = 7_777_777_777_777_777  # as long as that of a text
WAIT_SECONDS = 5


def floor() -> Run:
    cursor = _cursor()

    def run(times: int) -> None:
        for _ in range(times):
            cursor.execute("SELECT 1").fetchone()

    return run


def by_hand() -> Run:
    cursor = _cursor()

    def run(times: int) -> None:
        for _ in range(times):
            cursor.execute("SELECT pg_advisory_lock(%s)", (KEY,)).fetchone()
            cursor.execute("SELECT pg_advisory_unlock(%s)", (KEY,)).fetchone()

    return run


def by_hand_with_timeout() -> Run:
    cursor = _cursor()
    take = "SELECT set_config('lock_timeout', %s, true), pg_advisory_lock(%s)"
    wait = f"{WAIT_SECONDS}s"

    def run(times: int) -> None:
        for _ in range(times):
            cursor.execute(take, (wait, KEY)).fetchone()
            cursor.execute("SELECT pg_advisory_unlock(%s)", (KEY,)).fetchone()

    return run


def session() -> Run:
    return _entering(_advisory()("k"))


def session_built_each_time() -> Run:
    advisory = _advisory()

    def run(times: int) -> None:
        for _ in range(times):
            with advisory("k"):
                pass

    return run


def timeout() -> Run:
    return _entering(_advisory()("k", timeout=WAIT_SECONDS))


def without_waiting() -> Run:
    return _entering(_advisory()("k", timeout=0))


def shared() -> Run:
    return _entering(_advisory()("k", shared=True))


def eight_keys() -> Run:
    return _entering(_advisory()(*(f"k{number}" for number in range(8))))


def limit() -> Run:
    return _entering(_advisory()("k", limit=3))


def nested() -> Run:
    lock = _advisory()("k")
    run_inside = _entering(lock)

    def run(times: int) -> None:
        with lock:
            run_inside(times)

    return run


def transaction() -> Run:
    set_up("celery_pglock")
    return _entering(_transaction(), doing=_select())


def xact() -> Run:
    return _entering(_advisory()("k", xact=True), doing=_select())


def xact_with_timeout() -> Run:
    return _entering(_advisory()("k", xact=True, timeout=WAIT_SECONDS), doing=_select())


def empty_xact() -> Run:
    return _entering(_advisory()("k", xact=True))


def django_pglock() -> Run:
    pglock = _django_pglock()

    def run(times: int) -> None:
        for _ in range(times):
            with pglock.advisory("k"):
                pass

    return run


def django_pglock_with_timeout() -> Run:
    pglock = _django_pglock()

    def run(times: int) -> None:
        for _ in range(times):
            with pglock.advisory("k", timeout=WAIT_SECONDS):
                pass

    return run


def django_pglock_xact() -> Run:
    pglock = _django_pglock()
    select = _select()

    def run(times: int) -> None:
        for _ in range(times):
            with pglock.advisory("k", xact=True):
                select()

    return run


def redis_lock() -> Run:
    client = peer("redis").from_url(os.environ["REDIS_URL"])

    def run(times: int) -> None:
        for _ in range(times):
            with client.lock("k", timeout=60):
                pass

    return run


def peer(module: str) -> Any:
    """The module of somebody else's library, which need not be installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ContenderFailed(f"{error}: `make bench` installs it, or pip install '.[benchmarks]'") from None


def _cursor() -> Any:
    import psycopg

    connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    # By default psycopg prepares what is executed for the sixth time.
    connection.prepare_threshold = 0
    return connection.cursor()


def _advisory() -> Any:
    set_up("celery_pglock")
    from celery_pglock import advisory

    return advisory


def _django_pglock() -> Any:
    peer("pglock")
    set_up("pgactivity", "pglock")
    return peer("pglock")


def _transaction() -> Any:
    from django.db import transaction

    return transaction.atomic(durable=True)


def _select() -> Callable[[], object]:
    """What each transaction does, with or without a lock."""
    cursor = djangos_cursor()

    def select() -> object:
        cursor.execute("SELECT 1")
        return cursor.fetchone()

    return select


def _entering(lock: AbstractContextManager[object], doing: Callable[[], object] | None = None) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            with lock:
                pass

    def run_and_do(times: int) -> None:
        assert doing
        for _ in range(times):
            with lock:
                doing()

    return run_and_do if doing else run
