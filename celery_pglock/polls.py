"""Waiting for sockets, in threads as among gevent's greenlets."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

# Linux tells of the other side's end without anything to read.
ENDED: Final = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
READABLE: Final = select.POLLIN

# How often a socket is looked at where a poll would stop all the greenlets.
LOOK_EVERY = 0.05


def look(events_by_socket: Mapping[int, int]) -> bool:
    """Whether one of these events has happened on its socket; never waits."""
    return _poll(events_by_socket, 0)


def wait(events_by_socket: Mapping[int, int], seconds: float) -> bool:
    """Wait for one of these events; whether it has happened."""
    if not _is_patched():
        return _poll(events_by_socket, seconds)
    give_up = time.monotonic() + seconds
    while not look(events_by_socket):
        left = give_up - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, LOOK_EVERY))
    return True


class Watch:
    """Events of one socket that are looked for time and again, without waiting."""

    def __init__(self, socket: int, events: int) -> None:
        self._events = events | ENDED
        self._poll = _new_poll()
        self._poll.register(socket, events)

    def has_happened(self) -> bool:
        happened = self._poll.poll(0)
        return bool(happened) and bool(happened[0][1] & self._events)


def _poll(events_by_socket: Mapping[int, int], seconds: float) -> bool:
    poll = _new_poll()
    for socket, events in events_by_socket.items():
        poll.register(socket, events)
    return any(event & (events_by_socket[socket] | ENDED) for socket, event in poll.poll(1000 * seconds))


def _new_poll() -> Any:
    # gevent's own poll knows no POLLRDHUP.
    return _gevent().get_original("select", "poll")() if _is_patched() else select.poll()


def _gevent() -> Any:
    return sys.modules.get("gevent.monkey")


def _is_patched() -> bool:
    monkey = _gevent()
    return bool(monkey and monkey.is_module_patched("select"))
