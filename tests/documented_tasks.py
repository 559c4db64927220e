"""Tasks of the shop of which the documents speak, on a worker that logs and counts as they show."""

import os
import time

from celery_pglock import AdvisoryTask, Retry, Skip, install
from celery_pglock.conflicts import PREEMPTED
from tests.celery_app import app
from tests.documents import python_block
from tests.models import Entry
from tests.worker_tasks import write

if "AS_DOCUMENTED" in os.environ:
    exec(python_block("docs/how-to/structured-logs.md", "# shop/logs.py"))  # noqa: S102 - it is ours
    METRICS = {"__name__": "shop.metrics"}
    exec(python_block("docs/how-to/metrics.md", "# shop/metrics.py"), METRICS)  # noqa: S102


def wait_for_the_row(key: str) -> None:
    """For as long as the test has it."""
    Entry.objects.filter(key=key).update(what="seen")


@app.task(name="shop.tasks.sync_stock", base=AdvisoryTask, lock_key="stock:{warehouse}")
def sync_stock(warehouse):
    wait_for_the_row(warehouse)


@app.task(name="shop.tasks.count_stock", base=AdvisoryTask, lock_key="stock:{warehouse}", lock_timeout=60)
def count_stock(warehouse):
    return "counted"


@app.task(
    name="shop.tasks.import_account",
    base=AdvisoryTask,
    lock_key="import:{account_id}",
    lock_side_effect=Skip(),
)
def import_account(account_id):
    wait_for_the_row(f"account {account_id}")


@app.task(
    name="shop.tasks.transfer", base=AdvisoryTask, lock_key="transfer", lock_side_effect=Retry(0.5, 0.5)
)
def transfer():
    return "transferred"


@app.task(name="shop.tasks.render", base=AdvisoryTask, lock_key="render:{page}", lock_side_effect=Skip())
def render(page):
    return "rendered"


@app.task(name="shop.tasks.import_books", base=AdvisoryTask, bind=True, lock_key="books:{year}")
def import_books(self, year):
    write(self, f"books:{year}", "begins")
    if PREEMPTED not in (self.request.headers or {}):
        time.sleep(60)
    return "imported"


@app.task(name="reports.tasks.render")
def render_report(customer_id):
    wait_for_the_row(f"customer {customer_id}")


install(app, {"reports.tasks.render": {"lock_by": ("customer_id",), "lock_side_effect": Skip()}})

# The critical task is the one that is shown.
CRITICAL = {"__name__": "shop.tasks", "app": app}
exec(python_block("docs/how-to/critical-tasks.md", "from celery_pglock import AdvisoryTask"), CRITICAL)  # noqa: S102
close_the_month = CRITICAL["close_the_month"]
