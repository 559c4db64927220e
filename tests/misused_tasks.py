"""Tasks of which two cannot be bound."""

from celery import Task

from celery_pglock import AdvisoryTask
from tests.celery_app import app


@app.task(base=AdvisoryTask, lock_kei="x")
def misspelt():
    pass


@app.task(base=AdvisoryTask)
def well():
    pass


@app.task(base=AdvisoryTask, lock_key="x:{acount}")
def misnamed(account):
    pass


@app.task(base=Task, lock_timeout=5)
def foreign():
    pass
