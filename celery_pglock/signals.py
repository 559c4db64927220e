"""The signals that tell what became of a lock or of a backend, or what a report found.

They are Django signals, sent robustly: a receiver that fails is logged, and the work goes on. Of those about
locks ``sender`` is the task, and every one carries ``lock``, the lock's value.
"""

from __future__ import annotations

from django.dispatch import Signal

lock_acquired: Signal = Signal(use_caching=True)
"""The lock was obtained, and the body is about to run. Also, in seconds, ``waited`` in place and ``delayed``
since the task's first conflict, over all its retries; ``attempt`` counts from 1."""

lock_conflict: Signal = Signal(use_caching=True)
"""The lock was not obtained. Also: ``conflict``, and what became of the task, ``outcome``: it was
``"skipped"``, ``"retried"`` or ``"raised"``; it was ``"redelivered"``, a copy of the message that holds the
lock, and comes back; or it ``"waits"`` in place until the broker takes its retry."""

lock_skipped: Signal = Signal(use_caching=True)
"""A task was skipped. Also: ``conflict``."""

lock_released: Signal = Signal(use_caching=True)
"""The lock was given back. Also: ``held`` in seconds."""

lock_lost: Signal = Signal(use_caching=True)
"""A lock turned out to be gone before the work was done. Also: ``reason``, and ``held`` in seconds until that
was found out."""

backend_stopped: Signal = Signal()
"""A backend was to be stopped: ``stop`` tells what became of it, ``action`` what was tried on which alias:
``using``."""

locks_reported: Signal = Signal()
"""The locks of an alias were looked at: ``report`` tells what was found there; the alias is ``using``."""
