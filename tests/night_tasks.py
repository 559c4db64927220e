"""Tasks of a shop that do not run, each for a reason of its own."""

import time

from django.db import transaction

from celery_pglock import AdvisoryTask, Skip
from tests.celery_app import app
from tests.models import Entry


@app.task(base=AdvisoryTask, lock_key="import:{account_id}")
def import_account(account_id, seconds=0.0):
    time.sleep(seconds)
    return "imported"


@app.task(base=AdvisoryTask, lock_key="import:{account_id}", lock_side_effect=Skip())
def refresh_account(account_id):
    return "refreshed"


@app.task(base=AdvisoryTask, lock_key="import:{account_id}", lock_timeout=100)
def close_account(account_id):
    return "closed"


@app.task(base=AdvisoryTask, lock_key="stock:{warehouse}")
def sync_stock(warehouse):
    with transaction.atomic():
        Entry.objects.filter(key=warehouse).update(what="synced")
    return "synced"
