"""The signals that tell what became of a lock or of a backend, or what a report found.

They are Django signals, sent robustly: a receiver that fails is logged, and the work goes on. Of those about
locks ``sender`` is the task, and every one carries ``lock``, the lock's value.
"""

from __future__ import annotations

from django.dispatch import Signal

lock_acquired: Signal = Signal(use_caching=True)
"""The task has its lock, and its body is about to run.

``waited`` is in place, in this attempt; ``attempt`` counts from 1, over its retries for the lock; ``delayed``
is since its first conflict, over those retries, by the hosts' clocks, and 0.0 if it had none.
"""

lock_conflict: Signal = Signal(use_caching=True)
"""The lock was not obtained; sent after what became of the task.

``outcome`` tells that: ``"skipped"``, ``"retried"``, ``"raised"``, ``"redelivered"`` or ``"waits"``.
``conflict`` is a ``Conflict``, whose ``holders`` may be read.
"""

lock_skipped: Signal = Signal(use_caching=True)
"""``Skip`` ends the task; sent before the ``lock_conflict`` of it, with the same ``conflict``."""

lock_released: Signal = Signal(use_caching=True)
"""The lock was given back: after the body and its COMMIT, before the result, links and retries are sent.

``held`` is how long the task had it.
"""

lock_lost: Signal = Signal(use_caching=True)
"""Instead of ``lock_released``, if the lock turned out to be gone, however the body ended.

``held`` is until that was found out; ``reason`` is in words.
"""

backend_stopped: Signal = Signal()
"""A backend was to be stopped, by a command, the admin, ``prioritize``, ``prioritize_critical_tasks`` or a
queryset.

``stop`` tells what became of it, ``action`` what was tried on the alias ``using``. It has no ``lock``, and
``sender`` is ``None``.
"""

locks_reported: Signal = Signal()
"""``report_locks`` has looked at the locks of the alias ``using``.

``report`` has what its result has, as attributes, and durations as timedeltas. It has no ``lock``, and
``sender`` is ``None``.
"""
