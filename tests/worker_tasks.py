"""Tasks that tests send to real workers; each writes into the journal when its body begins and ends."""

import os
import time

from celery import Task
from django.db import connection

from celery_pglock import AdvisoryTask, Raise, Retry, SideEffect, Skip, XactAdvisoryTask
from tests.celery_app import app
from tests.models import Entry


def write(task: Task, key: str, what: str) -> None:
    Entry.objects.create(key=key, task_id=task.request.id, what=what)


def work(task: Task, key: str, seconds: float) -> str:
    write(task, key, "begins")
    time.sleep(seconds)
    write(task, key, "ends")
    return "done"


def retry_and_linger(task: Task) -> None:
    """A retry that was sent at once would meet the lock that is held until the end of this."""
    try:
        raise task.retry(countdown=0)
    finally:
        time.sleep(0.4)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def skips(self, key, seconds=0.0, after=None):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped", chain="stop"))
def skips_and_stops(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Raise())
def raises(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(countdown=0.2, maximum=0.5))
def retries(self, key, seconds=0.0):
    work(self, key, seconds)
    return self.request.retries


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=30)
def waits(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_limit=3, lock_side_effect=Retry(0.1, 0.3))
def at_most_three(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=XactAdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def in_transaction(self, key, seconds=0.0, then="return"):
    result = work(self, key, seconds)
    if then == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0)
    if then == "fail":
        raise ValueError("as asked")
    if then == "replace":
        return self.replace(skips.s(f"{key} replaced"))
    return result


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def retries_itself(self, key, times=1):
    work(self, key, 0)
    if self.request.retries < times:
        retry_and_linger(self)
    return "done"


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_side_effect=Retry(countdown=0.1, maximum=0.2),
    autoretry_for=(ValueError,),
    max_retries=2,
    retry_backoff=False,
    default_retry_delay=0,
)
def fails(self, key):
    write(self, key, "begins")
    raise ValueError("as always")


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def replaces_itself(self, key):
    work(self, key, 0)
    return self.replace(skips.s(key))


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_side_effect=Raise(),
    soft_time_limit=0.7,
    time_limit=60,
)
def soft_limited(self, key, seconds=30.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Raise(), time_limit=0.7)
def hard_limited(self, key, seconds=30.0):
    return work(self, key, seconds)


@app.task(
    base=AdvisoryTask, bind=True, lock_key="{key}", lock_timeout=None, soft_time_limit=0.7, time_limit=60
)
def soft_limited_while_waiting(self, key):
    return work(self, key, 0)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", acks_late=True, lock_side_effect=Skip("skipped"))
def acks_late(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}")
def tells_application_names(self, key):
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('application_name')")
        return [self.request.id, cursor.fetchone()[0], [str(one) for one in self.lock_for(key).holders()]]


@app.task(bind=True)
def plain(self, value=None, key="plain"):
    work(self, key, 0)
    return value


@app.task
def collect(results):
    return results


@app.task(bind=True)
def note_error(self, key):
    write(self, key, "begins")


@app.task(
    base=AdvisoryTask,
    lock_key="{key}",
    lock_side_effect=Raise(),
    autoretry_for=(Exception,),
    default_retry_delay=60,
)
def raises_and_retries_anything(key):
    return "done"


@app.task(
    base=AdvisoryTask,
    lock_key="{key}",
    lock_side_effect=Retry(countdown=0.1, maximum=0.1, max_retries=2, then=Skip("gave up")),
)
def gives_up(key):
    return "done"


@app.task(
    base=AdvisoryTask,
    lock_key="{key}",
    lock_side_effect=Retry(countdown=0.2, maximum=0.2, deadline=0.7, then=Skip("gave up")),
)
def gives_up_in_time(key):
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def retries_itself_without_throwing(self, key):
    work(self, key, 0)
    if self.request.retries == 0:
        self.retry(countdown=0, throw=False)
        time.sleep(0.4)
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(countdown=0.1, maximum=0.1))
def tells_conflicts(self, key, before=None):
    conflicts = (self.request.headers or {}).get("pglock_conflicts")
    if self.request.retries == 0:
        raise self.retry(countdown=0, kwargs={"before": conflicts})
    return [before, conflicts]


@app.task
def tells_application_name():
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('application_name')")
        return cursor.fetchone()[0]


class TwiceThenTake(SideEffect):
    """A side effect of a user's own: comes back once, then gives a result of its own."""

    def on_conflict(self, conflict):
        if conflict.attempt < 2:
            return conflict.retry(countdown=0.1)
        return f"took attempt {conflict.attempt}"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_side_effect=TwiceThenTake())
def decides_itself(key):
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Raise())
def leaves(self, key):
    write(self, key, "begins")
    raise SystemExit


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_side_effect=Skip("skipped"),
    acks_late=True,
    ignore_result=True,
)
def without_result(self, key, seconds=0.0):
    return work(self, key, seconds)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def retries_with_what_no_message_holds(self, key):
    raise self.retry(kwargs={"key": object()})


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def retries_with_wrong_arguments(self, key):
    raise self.retry(args=[1, 2, 3])


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip(result="skipped"))
def replaces_itself_with_what_nobody_could_send(self, key):
    return self.replace(skips.s())


@app.task(
    base=AdvisoryTask,
    bind=True,
    lock_key="{key}",
    lock_side_effect=Skip(result="skipped"),
    lock_on_direct_call=True,
)
def calls_and_retries_itself(self, key, called=False):
    work(self, key, 0)
    if not called:
        calls_and_retries_itself(f"{key}, called", called=True)
    if not called and self.request.retries == 0:
        retry_and_linger(self)
    return "done"


if os.environ.get("MISSPELT_OPTION"):

    @app.task(base=AdvisoryTask, lock_kei="x")
    def misspelt():
        pass
