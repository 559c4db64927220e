"""What workers know of the tasks that they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from kombu.exceptions import OperationalError

from celery_pglock.printed_texts import one_line

# In seconds: a worker answers at once or, if it runs a task in its only process, not at all.
PATIENCE = 1.0

# Two workers could have one name: more answers are waited for than workers were asked.
NO_LIMIT = 10_000

Run: TypeAlias = tuple[str, str]
"""A worker, and the id of a task that it runs."""


def not_running(app: Any, runs: frozenset[Run]) -> tuple[frozenset[Run], tuple[str, ...]]:
    """Which of these runs their workers do not know of, and what could not be learned."""
    connection = app.connection_for_write()
    failures = (OperationalError, *connection.connection_errors, *connection.channel_errors)
    if not (app.conf.worker_enable_remote_control and connection.supports_exchange_type("fanout")):
        return frozenset(), ("whether tasks run: the workers take no remote control",)
    try:
        with connection:
            # Celery would go on trying for as long as the broker is away.
            connection.ensure_connection(max_retries=1, interval_start=0)
            return _not_running(app, connection, runs)
    except failures as error:
        return frozenset(), (f"whether tasks run: {one_line(error) or type(error).__name__}",)


def _not_running(app: Any, connection: Any, runs: frozenset[Run]) -> tuple[frozenset[Run], tuple[str, ...]]:
    ids = {"ids": sorted({task_id for _, task_id in runs})}
    known = _ask(app, connection, "query_task", runs, ids, limit=None)
    unknown = frozenset(run for run in runs if run[0] in known and run[1] not in known[run[0]])
    silent = {worker for worker, _ in runs} - known.keys()
    if unknown:
        # A worker that loses its broker forgets requests, in Celery 5.4 all of them (Consumer.on_close()),
        # but not which are active.
        active = _ask(app, connection, "active", unknown, {}, limit=NO_LIMIT)
        silent |= {worker for worker, _ in unknown} - active.keys()
        unknown = frozenset(run for run in unknown if run[0] in active and run[1] not in active[run[0]])
    return unknown, tuple(
        f"whether tasks run: worker {one_line(worker)} did not answer" for worker in sorted(silent)
    )


def _ask(
    app: Any,
    connection: Any,
    command: str,
    runs: Iterable[Run],
    arguments: Mapping[str, Any],
    *,
    limit: int | None,
) -> dict[str, set[str]]:
    """The ids of tasks that each worker tells of, by the names of those that answer."""
    replies = app.control.broadcast(
        command,
        arguments=dict(arguments),
        destination=sorted({worker for worker, _ in runs}),
        reply=True,
        timeout=PATIENCE,
        limit=limit,
        connection=connection,
    )
    told: dict[str, set[str]] = {}
    for reply in replies or ():
        for worker, answer in reply.items():
            if isinstance(answer, list):
                told.setdefault(worker, set()).update(one["id"] for one in answer)
            elif isinstance(answer, dict) and "error" not in answer:
                told.setdefault(worker, set()).update(answer)
    return told
