"""Tasks as others write them, without any lock; annotations and rules give them one."""

from functools import wraps

import celery.contrib.testing.tasks
import djcelery_email.tasks
from celery import Task, shared_task

from celery_pglock import Skip, install
from tests.celery_app import app
from tests.models import Entry

install(
    app,
    {
        "third.*": {"lock_timeout": 0, "lock_side_effect": Skip("skipped")},
        "third.by_*": {"lock_by": ("account_id",)},
        "third.prty.*": {"lock_shared": True},
        "celery.ping": {"lock_key": "ping", "lock_side_effect": Skip("no pong")},
    },
)


def noted(function):
    """A decorator of somebody else's."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        Entry.objects.create(key="noted", task_id="", what="begins")
        return function(*args, **kwargs)

    return wrapper


@shared_task(name="third.by_account")
@noted
def by_account(account_id, amount=0):
    return f"account {account_id}"


class Accounting(Task):
    """A base class of somebody else's, with a call of its own."""

    lock = "a lock of their own"
    lock_timeout = "as they call it"

    def __call__(self, *args, **kwargs):
        return f"called: {super().__call__(*args, **kwargs)}"


@app.task(base=Accounting, bind=True, name="third.accounting")
def accounting(self):
    return f"{self.lock}, {self.lock_timeout}"


class Closing(Accounting):
    name = "third.closing"

    def run(self):
        return "closed"


closing = app.register_task(Closing())


class ClosingLate(Closing):
    """What Celery tells nobody of: bound like its base class already, and with a hook of its own."""

    name = "third.closing_late"

    @classmethod
    def on_bound(cls, app):
        pass


closing_late = app.register_task(ClosingLate())


@app.task(name="annotated", bind=True)
def annotated(self):
    return self.lock.name


@app.task
def untouched():
    return "untouched"


THEIRS = (celery.contrib.testing.tasks.ping, djcelery_email.tasks.send_emails)
