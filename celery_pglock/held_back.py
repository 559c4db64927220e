"""The messages that a task sends about itself, kept until its lock is given back."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery.exceptions import Reject
from kombu.exceptions import EncodeError, OperationalError

logger = logging.getLogger(__name__)

# A message that the broker refused is tried at most twice a second.
SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 5.0


class BrokerRefused(Exception):
    """The broker did not take a message; the message says what it answered."""


def pauses() -> Iterator[float]:
    """Seconds between attempts at a broker: longer and longer, and never the same for everybody."""
    pause = SHORTEST_PAUSE
    while True:
        yield pause * random.uniform(1, 1.5)
        pause = min(2 * pause, LONGEST_PAUSE)


def publish(app: Any, send: Callable[[], Any]) -> None:
    """Send once; raises ``BrokerRefused`` for what the broker answers, and other errors as they are."""
    connection = app.connection_for_write()
    refusals = (OperationalError, *connection.connection_errors, *connection.channel_errors)
    try:
        send()
    except refusals as error:
        raise BrokerRefused(f"{type(error).__name__}: {error}") from error


class HeldBack:
    """What one run of a task wants to be sent once its lock is free."""

    def __init__(self) -> None:
        self._sends: list[Callable[[], Any]] = []
        self._retries: list[Any] = []

    @property
    def is_empty(self) -> bool:
        return not self._sends

    def send_later(self, send: Callable[[], Any]) -> None:
        self._sends.append(send)

    def divert(self, retry: Any) -> None:
        """Make ``retry.apply_async()`` wait for its turn here."""
        apply_async = retry.apply_async
        self._retries.append(retry)

        def send_or_reject(*args: Any, **kwargs: Any) -> None:
            try:
                apply_async(*args, **kwargs)
            except (EncodeError, TypeError, ValueError) as error:
                # As Task.retry does with a message that nobody could send.
                raise Reject(error, requeue=False) from error

        retry.apply_async = lambda *args, **kwargs: self.send_later(lambda: send_or_reject(*args, **kwargs))

    def put_into_headers(self, name: str) -> None:
        """Put a header that is true into the retries that wait here."""
        for retry in self._retries:
            retry.options["headers"][name] = True

    def send_all(self, app: Any, task: str, extra: dict[str, Any]) -> None:
        """Send everything, in order; while the broker refuses, the task waits here rather than lose it.

        ``extra`` is what the log records of that carry beside their text.
        """
        while self._sends:
            for pause in pauses():
                try:
                    publish(app, self._sends[0])
                    break
                except BrokerRefused as refused:
                    logger.warning(
                        "%s waits in place until the broker takes its message: %s", task, refused, extra=extra
                    )
                    time.sleep(pause)
            del self._sends[0]
