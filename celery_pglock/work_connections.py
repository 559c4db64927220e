"""The names that Django's connections carry while a task works on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections

from celery_pglock import labels


@contextmanager
def named_after(task_id: str) -> Iterator[None]:
    """Connections opened by this thread in the block are ``celery:<task id>`` to the server.

    It costs no round trip, as the name goes with the connection's parameters. Connections that are open
    already, or come from a pool, outlive the task: they keep their names.
    """
    name = labels.application_name(labels.WORK_CONNECTION, task_id)
    before: list[tuple[Any, dict[str, Any]]] = []
    for connection in connections.all():
        settings = connection.settings_dict
        if connection.vendor == "postgresql" and not settings["OPTIONS"].get("pool"):
            before.append((connection, settings))
            # A copy: the dict itself is shared by all threads.
            connection.settings_dict = {
                **settings,
                "OPTIONS": {**settings["OPTIONS"], "application_name": name},
            }
    try:
        yield
    finally:
        for connection, settings in before:
            connection.settings_dict = settings
