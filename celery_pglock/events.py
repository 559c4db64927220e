"""The events that a worker sends about its locks."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from typing import Any

from celery_pglock import signals, undisturbed

logger = logging.getLogger(__name__)

# So many events wait for a broker that is away; later ones are dropped.
MOST_THAT_WAIT = 1000
# Seconds that a process which ends waits for its last events to be sent.
PATIENCE = 2.0


def follow(worker: Any) -> None:
    """Send what this worker does, if it was told to by its settings or by ``-E``."""
    if worker.task_events:
        _connect()


def follow_child(app: Any) -> None:
    """Send what this child does, which was spawned, if its settings say so."""
    if app.conf.worker_send_task_events:
        _connect()


def _connect() -> None:
    # Without events each lock is spared the way here.
    for signal, receiver in (
        (signals.lock_acquired, _acquired),
        (signals.lock_conflict, _conflict),
        (signals.lock_skipped, _skipped),
        (signals.lock_released, _released),
        (signals.lock_lost, _lost),
    ):
        signal.connect(receiver, dispatch_uid=f"celery_pglock.events{receiver.__name__}")


def send_the_last() -> None:
    """Wait until what this process has to tell is sent, for ``PATIENCE`` seconds at most."""
    for outbox in _outboxes.values():
        outbox.send_the_last()


class Outbox:
    """The events of one process that wait for being sent.

    The thread and the connection are its own: a broker that is away holds up those, and no task.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        # Of all queues this one alone may be interrupted by a signal at any point.
        self._waiting: queue.SimpleQueue[tuple[str, str, dict[str, Any]] | threading.Event] = (
            queue.SimpleQueue()
        )
        self._connection: Any = None
        self._thread = threading.Thread(target=self._run, name="celery_pglock-events", daemon=True)
        self._complained = False
        undisturbed.start(self._thread)

    def put(self, hostname: str, kind: str, fields: dict[str, Any]) -> None:
        if self._waiting.qsize() < MOST_THAT_WAIT:
            self._waiting.put((hostname, kind, fields))
        else:
            self._complain(kind, f"{MOST_THAT_WAIT} others wait for the broker")

    def send_the_last(self) -> None:
        sent = threading.Event()
        self._waiting.put(sent)
        sent.wait(PATIENCE)

    def _run(self) -> None:
        while True:
            if isinstance(one := self._waiting.get(), threading.Event):
                one.set()
            else:
                self._send(*one)

    def _send(self, hostname: str, kind: str, fields: dict[str, Any]) -> None:
        try:
            try:
                self._publish(hostname, kind, fields)
            except Exception:
                # A connection may have been cut while there was nothing to send.
                self._hang_up()
                self._publish(hostname, kind, fields)
            self._complained = False
        except Exception as error:
            self._hang_up()
            self._complain(kind, str(error))

    def _publish(self, hostname: str, kind: str, fields: dict[str, Any]) -> None:
        self._connection = self._connection or self._app.connection_for_write()
        with self._app.events.Dispatcher(
            self._connection, hostname=hostname, buffer_while_offline=False
        ) as dispatcher:
            dispatcher.send(kind, **fields)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def _complain(self, kind: str, why: str) -> None:
        # Once, and not of each event while it lasts.
        if not self._complained:
            self._complained = True
            logger.warning(
                "The event %s was not sent, nor are more until the broker takes them: %s", kind, why
            )


_outboxes: dict[Any, Outbox] = {}
_making_one = threading.Lock()


def _begin_anew_in_a_child() -> None:
    # A child has neither the thread nor a connection that it may use.
    global _outboxes, _making_one
    _outboxes, _making_one = {}, threading.Lock()


os.register_at_fork(after_in_child=_begin_anew_in_a_child)


def _acquired(sender: Any, lock: Any, waited: float, attempt: int, delayed: float, **_: Any) -> None:
    _send("pglock-acquired", sender, lock, waited=waited, attempt=attempt, delayed=delayed)


def _conflict(sender: Any, lock: Any, conflict: Any, outcome: str, **_: Any) -> None:
    _send(
        "pglock-conflict",
        sender,
        lock,
        outcome=outcome,
        attempt=conflict.attempt,
        waited=conflict.waited,
        holders=[holder.as_dict() for holder in conflict.holders],
    )


def _skipped(sender: Any, lock: Any, conflict: Any, **_: Any) -> None:
    _send("pglock-skipped", sender, lock, waited=conflict.waited)


def _released(sender: Any, lock: Any, held: float, **_: Any) -> None:
    _send("pglock-released", sender, lock, held=held)


def _lost(sender: Any, lock: Any, held: float, reason: str, **_: Any) -> None:
    _send("pglock-lost", sender, lock, held=held, reason=reason)


def _send(kind: str, task: Any, lock: Any, **fields: Any) -> None:
    if not (_is_of_a_message(task.request, lock) and task.send_events):
        return
    identity = {"uuid": task.request.id, "name": task.name, "key": lock.name}
    _outbox(task.app).put(task.request.hostname, kind, {**identity, **fields, "timestamp": time.time()})


def _outbox(app: Any) -> Outbox:
    with _making_one:
        if app not in _outboxes:
            _outboxes[app] = Outbox(app)
        return _outboxes[app]


def _is_of_a_message(request: Any, lock: Any) -> bool:
    # A direct call has the request of the body that makes it, or none; the lock is of its own then.
    return not request.is_eager and vars(request).get("pglock_lock") == lock
