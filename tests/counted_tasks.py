"""Tasks that do nothing, so that only their locks use the database."""

from celery_pglock import AdvisoryTask, advisory
from tests.celery_app import app


@app.task(base=AdvisoryTask, lock_key="counted:{number}", ignore_result=True)
def one_lock(number):
    pass


@app.task(base=AdvisoryTask, lock_key="counted:{number}", lock_timeout=10, ignore_result=True)
def nested_locks(number):
    with advisory("nested", number), advisory("innermost", number):
        pass


@app.task
def done():
    """Sent last."""
