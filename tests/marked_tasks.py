"""Critical tasks that tell what others see of them, and tasks that are stopped for such."""

import time

from celery import Task
from django.db import OperationalError, connection

from celery_pglock import AdvisoryTask, Raise, Skip
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
