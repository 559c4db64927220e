"""Threads that signal handlers cannot disturb in the making."""

from __future__ import annotations

import signal
import threading


def start(thread: threading.Thread) -> None:
    """Start the thread; it leaves signals to others.

    A handler that raises in the middle of starting one would leave a thread that nobody knows of.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # The thread inherits the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
