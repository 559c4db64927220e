"""Critical tasks that tell what others see of them, and tasks that are stopped for such."""

import time

from celery import Task
from django.db import OperationalError, connection

from celery_pglock import AdvisoryTask, LockLost, Raise, Skip, XactAdvisoryTask
from tests.celery_app import app
from tests.models import Entry

SEEN = """
SELECT a.application_name, l.objid::int FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)
WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.mode = 'ShareLock' AND a.datname = current_database()
ORDER BY 1
"""


def note(task: Task, what: str) -> None:
    Entry.objects.create(key="", task_id=task.request.id, what=what)


@app.task(base=AdvisoryTask, bind=True, lock_timeout=1, lock_priority=7)
def tells_its_markers(self):
    with connection.cursor() as cursor:
        cursor.execute(SEEN)
        return cursor.fetchall()


@app.task(base=AdvisoryTask, bind=True, lock_side_effect=Raise())
def sleeps_the_first_time(self):
    note(self, "begins")
    if Entry.objects.filter(task_id=self.request.id, what="begins").count() == 1:
        time.sleep(30)
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_side_effect=Skip("skipped"))
def fails_the_second_time(self):
    note(self, "begins")
    if Entry.objects.filter(task_id=self.request.id, what="begins").count() == 1:
        time.sleep(30)
    raise OperationalError("for a reason of its own")


@app.task(base=AdvisoryTask, bind=True, lock_side_effect=Raise())
def fails_after_a_retry_of_its_own(self):
    note(self, "begins")
    times = Entry.objects.filter(task_id=self.request.id, what="begins").count()
    if times == 1:
        time.sleep(30)
    if times == 2:
        raise self.retry(countdown=0)
    raise OperationalError("for a reason of its own")


@app.task(base=AdvisoryTask, bind=True)
def fails(self):
    raise OperationalError("for a reason of its own")


@app.task(base=AdvisoryTask, bind=True, autoretry_for=(LockLost,), lock_side_effect=Skip("skipped"))
def tries_again_by_itself(self):
    note(self, "begins")
    if Entry.objects.filter(task_id=self.request.id, what="begins").count() == 1:
        time.sleep(30)
    return "done"


tries_again_by_itself.default_retry_delay = 1


@app.task(
    base=XactAdvisoryTask, bind=True, lock_key="waited for", lock_timeout=30, lock_side_effect=Skip("no")
)
def waits_in_a_transaction(self):
    return "done"


@app.task(base=AdvisoryTask, bind=True, lock_key="waited for", lock_timeout=30, lock_side_effect=Skip("no"))
def waits(self):
    return "done"
