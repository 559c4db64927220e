"""Raising an error in a body that runs in the main thread, from another thread."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# Real-time signals are Linux's, and nobody else in a worker uses this one. macOS has none.
SIGNAL: int | None = signal.SIGRTMIN + 9 if hasattr(signal, "SIGRTMIN") else None


class Interruption:
    """One body, and the error that is to be raised in it: once, and never before or after it runs.

    A signal to a thread without a handler would end the whole process, and among greenlets it would hit the
    wrong one: so only a body in the main thread can be interrupted.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self._was_raised = False

    def order(self, error: Exception) -> None:
        """Raise the error in the body as soon as Python runs there; ordering it again changes nothing."""
        self._error = error
        ident = threading.main_thread().ident
        if self in _running and not self._was_raised and SIGNAL is not None and ident is not None:
            signal.pthread_kill(ident, SIGNAL)

    def run(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The body's result, or the error that was ordered."""
        _running.append(self)
        try:
            return body(*args, **kwargs)
        finally:
            _running.remove(self)

    def raise_once(self) -> None:
        """Raise the error that was ordered, if it has not been raised yet."""
        if self._error is not None and not self._was_raised:
            self._was_raised = True
            raise self._error


_running: list[Interruption] = []


def can_interrupt() -> bool:
    """Whether a body that would run here and now could be interrupted; makes it so where possible."""
    if SIGNAL is None or threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(SIGNAL)
    if handler is signal.SIG_DFL:
        signal.signal(SIGNAL, _raise_in_the_body)
        return True
    if handler is not _raise_in_the_body:
        logger.warning(
            "Signal %s has another handler, so no task is interrupted when it loses its lock", SIGNAL
        )
    return handler is _raise_in_the_body


def _raise_in_the_body(_number: int, frame: FrameType | None) -> None:
    # At the frame of run() itself the body has not begun yet, or is over: its result is not thrown away.
    if frame is None or frame.f_code is Interruption.run.__code__:
        return
    for interruption in reversed(_running):
        interruption.raise_once()
