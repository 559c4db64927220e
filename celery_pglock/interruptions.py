"""Raising an error in a body that runs in the main thread, from another thread."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from django.db.transaction import Atomic

from celery_pglock.clocks import now

logger = logging.getLogger(__name__)

# Real-time signals are Linux's, and nobody else in a worker uses this one. macOS has none.
SIGNAL: int | None = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else None

# Code in the middle of a body may swallow any error, as handlers of logging do: then it is raised again.
AGAIN_AFTER = 5.0


class Interruption:
    """One body, and the error that is to be raised in it; never before or after it runs.

    A signal to a thread without a handler would end the whole process, and among greenlets it would hit the
    wrong one: so only a body in the main thread can be interrupted.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._not_before = 0.0

    def order(self, error: Exception) -> None:
        """Raise the error in the body as soon as Python runs there, unless that was made lately."""
        self._error = error
        ident = threading.main_thread().ident
        if self in _running and self._is_due and SIGNAL is not None and ident is not None:
            signal.pthread_kill(ident, SIGNAL)

    def was_made(self) -> None:
        """The body knows: leave it the time to end."""
        self._not_before = now() + AGAIN_AFTER

    def run(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The body's result, or the error that was ordered."""
        try:
            _running.append(self)
            return body(*args, **kwargs)
        finally:
            _running[:] = [one for one in _running if one is not self]

    def make(self) -> None:
        """Raise the error that was ordered, if it is due, and the body is not at handling it."""
        if self._error is not None and self._is_due and not isinstance(sys.exc_info()[1], type(self._error)):
            self.was_made()
            raise self._error

    @property
    def _is_due(self) -> bool:
        return now() >= self._not_before


_running: list[Interruption] = []


def can_interrupt() -> bool:
    """Whether a body that would run here and now could be interrupted; makes it so where possible."""
    if SIGNAL is None or threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(SIGNAL)
    if handler is signal.SIG_DFL:
        signal.signal(SIGNAL, _interrupt)
        return True
    if handler is not _interrupt:
        logger.warning(
            "Signal %s has another handler, so no task is interrupted when it loses its lock", SIGNAL
        )
    return handler is _interrupt


def forget_what_was_left() -> None:
    """Forget the bodies of this thread, when the task that they belong to has ended."""
    if threading.current_thread() is threading.main_thread():
        _running.clear()


def _is_between_transactions(frame: FrameType | None) -> bool:
    # In the middle of Django's own BEGIN or COMMIT an error would leave the connection unusable, and another
    # would hide it. The order is repeated soon.
    while frame is not None and frame.f_code is not Interruption.run.__code__:
        if frame.f_code in (Atomic.__enter__.__code__, Atomic.__exit__.__code__):
            return True
        frame = frame.f_back
    return False


def _interrupt(_number: int, frame: FrameType | None) -> None:
    # At the frame of run() itself the body has not begun yet, or is over: its result is not thrown away.
    if frame is None or frame.f_code is Interruption.run.__code__ or _is_between_transactions(frame):
        return
    for interruption in reversed(_running):
        interruption.make()
