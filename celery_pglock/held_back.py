"""The messages that a task sends about itself, kept until its lock is given back."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from celery.exceptions import Reject
from kombu.exceptions import EncodeError

logger = logging.getLogger(__name__)

# A message that the broker refused is tried at most twice a second.
SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


class BrokerRefused(Exception):
    """The broker did not take a message; the message says what it answered."""


def pauses() -> Iterator[float]:
    """Seconds between attempts at a broker: longer and longer, and never the same for everybody."""
    pause = SHORTEST_PAUSE
    while True:
        yield pause * random.uniform(1, 1.5)
        pause = min(2 * pause, LONGEST_PAUSE)


def publish(send: Callable[[], Any]) -> None:
    """Send once; raises ``BrokerRefused``, or what Celery raises for a message that nobody could send."""
    try:
        send()
    except EncodeError as error:
        raise Reject(error, requeue=False) from error
    except Exception as error:
        raise BrokerRefused(f"{type(error).__name__}: {error}") from error


class HeldBack:
    """What one run of a task wants to be sent once its lock is free."""

    def __init__(self) -> None:
        self._sends: list[Callable[[], Any]] = []

    def later(self, send: Callable[[], Any]) -> None:
        self._sends.append(send)

    def hold(self, signature: Any) -> None:
        """Make sending this signature wait."""
        send = signature.apply_async
        signature.apply_async = lambda *args, **kwargs: self.later(lambda: send(*args, **kwargs))

    def send_all(self, task: str) -> None:
        """Send everything, in order; while the broker refuses, the task waits here rather than lose it."""
        for send in self._sends:
            for pause in pauses():
                try:
                    publish(send)
                    break
                except BrokerRefused as refused:
                    logger.warning("%s waits in place until the broker takes its message: %s", task, refused)
                    time.sleep(pause)
