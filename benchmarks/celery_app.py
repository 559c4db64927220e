"""What the Celery apps that are compared have in common."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task
from celery.worker.request import Request

# The file descriptor by which a worker tells of a batch that is done, the size of one, and its queue.
DONE = "DONE"
BATCH = "BATCH"
QUEUE = "QUEUE"

ALL_DONE = b"."
FAILED = b"!"


def made(name: str) -> Celery:
    """An app in a Django project, if ``DJANGO_SETTINGS_MODULE`` names one."""
    if "DJANGO_SETTINGS_MODULE" in os.environ:
        import django

        django.setup()
    app = Celery(f"benchmarks.{name}", broker=os.environ["REDIS_URL"])
    app.conf.task_default_queue = os.environ.get(QUEUE, name)
    app.conf.broker_connection_retry_on_startup = True
    app.conf.task_ignore_result = bool(os.environ.get("IGNORE_RESULT"))
    app.conf.task_always_eager = bool(os.environ.get("EAGER"))
    if "CELERY_DB_REUSE_MAX" in os.environ:
        app.conf.CELERY_DB_REUSE_MAX = int(os.environ["CELERY_DB_REUSE_MAX"])
    if DONE in os.environ:
        # Whoever sends the tasks does not look at their results, and so has no connection for them.
        app.conf.result_backend = os.environ["REDIS_URL"]
        # Not only of this app: the base classes of libraries do not derive from its own.
        Task.Request = f"{__name__}:CountedRequest"
    return app


class CountedRequest(Request):
    """A request whose worker says how many have ended, when their results are known to it."""

    ended = 0

    def __init_subclass__(cls) -> None:
        # For each task Celery makes a subclass, whose on_success does not call that of its base.
        on_success = cls.on_success

        def counted(self: CountedRequest, failed__retval__runtime: Any, **kwargs: Any) -> Any:
            result = on_success(self, failed__retval__runtime, **kwargs)
            CountedRequest.ended += 1
            if failed__retval__runtime[0]:
                _tell(FAILED)
            elif CountedRequest.ended % int(os.environ[BATCH]) == 0:
                _tell(ALL_DONE)
            return result

        cls.on_success = counted

    def on_failure(self, *args: Any, **kwargs: Any) -> Any:
        _tell(FAILED)
        return super().on_failure(*args, **kwargs)


def _tell(what: bytes) -> None:
    os.write(int(os.environ[DONE]), what)
