"""All tasks of a worker that reaches PostgreSQL only through a pooler in transaction mode."""

import time

from celery_pglock import Retry, XactAdvisoryTask
from tests.celery_app import app
from tests.models import Entry


@app.task(base=XactAdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(0.05, 0.2))
def only_in_transaction(self, key):
    Entry.objects.create(key=key, task_id=self.request.id, what="begins")
    time.sleep(0.01)
    Entry.objects.create(key=key, task_id=self.request.id, what="ends")
    return "done"
