"""The messages and results in Redis: where each is, and who may send."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis

QUEUE = "celery"
UNACKED = "unacked"

# A user of the broker who is never refused anything.
DIRECTOR = "director"

PAUSE_MILLISECONDS = 2000


class Messages:
    """What the broker and the result backend know, asked by somebody apart from the workers."""

    def __init__(self, url: str) -> None:
        with redis.from_url(url) as client:
            client.execute_command("ACL", "SETUSER", DIRECTOR, "on", "nopass", "~*", "&*", "+@all")
        self.url = url.replace("://", f"://{DIRECTOR}:{DIRECTOR}@", 1)
        self._client = redis.from_url(self.url)

    def close(self) -> None:
        self._client.close()

    def refuse(self) -> None:
        """Answer NOPERM to whoever sends a message; all else works."""
        self._client.execute_command("ACL", "SETUSER", "default", "-lpush")

    def accept(self) -> None:
        self._client.execute_command("ACL", "SETUSER", "default", "+lpush")

    def where(self) -> tuple[set[str], set[str]]:
        """The ids of the tasks that are queued, and of those that are in some worker's hands."""
        with self._client.pipeline(transaction=True) as pipe:
            pipe.lrange(QUEUE, 0, -1)
            pipe.hvals(UNACKED)
            queued, in_hand = pipe.execute()
        return (
            {_task_id(json.loads(message)) for message in queued},
            {_task_id(json.loads(message)[0]) for message in in_hand},
        )

    def backlog(self) -> int:
        return int(self._client.llen(QUEUE)) + int(self._client.hlen(UNACKED))

    def outcomes(self, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The recorded result of each task that has one."""
        if not tasks:
            return {}
        found = self._client.mget([f"celery-task-meta-{task}" for task in tasks])
        return {
            task: json.loads(answer) for task, answer in zip(tasks, found, strict=True) if answer is not None
        }

    def restore(self, app: Any, visibility_timeout: float | None = None) -> None:
        """Deliver again what has been in a worker's hands for longer than the visibility timeout.

        Workers do it themselves, in the same way, but only every hundred seconds.
        """
        with app.connection_for_write() as connection:
            quality = connection.default_channel.qos
            if visibility_timeout is not None:
                quality.visibility_timeout = visibility_timeout
            quality.restore_visible(num=1000, interval=1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody sends or takes a message meanwhile."""
        self._client.execute_command("CLIENT", "PAUSE", PAUSE_MILLISECONDS, "WRITE")
        try:
            yield
        finally:
            self._client.execute_command("CLIENT", "UNPAUSE")


def _task_id(message: dict[str, Any]) -> str:
    return str(message["headers"]["id"])
