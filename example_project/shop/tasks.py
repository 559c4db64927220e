"""The tasks, each with the lock that its work needs.

Their bodies read, take their time, and write: without locks they would get into each other's way.
"""

from __future__ import annotations

import random
import time

from celery import Task
from django.db import transaction
from django.db.models import Max

from celery_pglock import AdvisoryTask, Retry, Skip, XactAdvisoryTask
from example_project.celery import app
from example_project.shop.journal import work
from example_project.shop.models import (
    Account,
    Analysis,
    Booking,
    Closing,
    Customer,
    Import,
    Invoice,
    Product,
    Report,
    Supplier,
    Transfer,
)

SKIPPED = "skipped"
SOON = Retry(countdown=0.5, maximum=2)
BOOKINGS = 15


class AddressMissing(Exception):
    """An invoice needs an address."""


@app.task(name="nightly_report", base=AdvisoryTask, bind=True, lock_side_effect=Skip(result=SKIPPED))
def nightly_report(self: Task) -> str:
    """Never two at once: beat may send it while the last one still runs, and that one is skipped.

    Without a ``lock_key`` the key is the task's name.
    """
    with work(self, "report"):
        time.sleep(random.uniform(1, 3.5))
        Report.objects.create(invoices=Invoice.objects.count())
    return "reported"


@app.task(base=AdvisoryTask, bind=True, lock_key="import:{supplier}", lock_side_effect=SOON)
def import_supplier(self: Task, supplier: str) -> str:
    """One at a time for each supplier; whoever finds it taken gives its place free and comes back."""
    with work(self, f"supplier {supplier}"):
        row = Supplier.objects.get(name=supplier)
        products = random.randint(10, 99)
        time.sleep(0.8)
        row.products += products
        with transaction.atomic():
            row.save()
            Import.objects.create(supplier=row, products=products)
    return "imported"


@app.task(base=AdvisoryTask, bind=True, lock_key="catalogue", lock_shared=True, lock_side_effect=SOON)
def bulk_import(self: Task, warehouse: str) -> str:
    """Any number at once, as they share the lock; none beside an analysis, which needs it alone."""
    with work(self, "catalogue"):
        for _ in range(5):
            Product.objects.create(warehouse=warehouse)
            time.sleep(0.3)
    return "imported"


@app.task(base=AdvisoryTask, bind=True, lock_key="catalogue", lock_timeout=10)
def analyse_catalogue(self: Task) -> str:
    """Alone: the catalogue must stand still. It waits in place, which holds new importers off.

    Coming back later, as ``Retry`` does, it might find some importer at work each time, for ever.
    """
    with work(self, "catalogue"):
        products_before = Product.objects.count()
        time.sleep(1)
        Analysis.objects.create(products_before=products_before, products_after=Product.objects.count())
    return "analysed"


@app.task(base=AdvisoryTask, bind=True, lock_key=["account:{source}", "account:{target}"], lock_timeout=10)
def transfer(self: Task, source: str, target: str, amount: int) -> str:
    """Both accounts or none, and no deadlock: keys are taken in the same order by everybody."""
    with work(self, f"account {source}", f"account {target}"):
        giver = Account.objects.get(name=source)
        taker = Account.objects.get(name=target)
        time.sleep(0.4)
        giver.balance -= amount
        taker.balance += amount
        with transaction.atomic():
            giver.save()
            taker.save()
            Transfer.objects.create(source=giver, target=taker, amount=amount)
    return "transferred"


@app.task(base=AdvisoryTask, bind=True, lock_key="export:{customer}", lock_limit=3, lock_side_effect=SOON)
def export_orders(self: Task, customer: str) -> str:
    """At most three at once for each customer."""
    with work(self, f"exports of {customer}"):
        time.sleep(random.uniform(0.6, 1.2))
    return "exported"


@app.task(
    base=XactAdvisoryTask,
    bind=True,
    lock_key="invoice numbers",
    lock_timeout=10,
    throws=(AddressMissing,),
)
def issue_invoice(self: Task, customer: str) -> str:
    """Numbers without gaps: the lock ends with the transaction that uses a number, or gives it up."""
    with work(self, "invoice numbers"):
        last = Invoice.objects.aggregate(last=Max("number"))["last"] or 0
        time.sleep(0.3)
        buyer = Customer.objects.get(name=customer)
        Invoice.objects.create(number=last + 1, customer=buyer)
        if not buyer.address:
            raise AddressMissing(f"{customer} has no address: number {last + 1} stays free")
    return "issued"


@app.task(base=AdvisoryTask, bind=True, lock_key="books", lock_side_effect=SOON)
def reconcile(self: Task) -> str:
    """Takes its time over the books. Stopped for the close it leaves nothing behind, and begins anew."""
    with work(self, "books"), transaction.atomic():
        for _ in range(BOOKINGS):
            Booking.objects.create()
            time.sleep(0.25)
    return "reconciled"


@app.task(base=AdvisoryTask, bind=True, lock_key="books", lock_timeout=20, lock_priority=10)
def close_month(self: Task) -> str:
    """Critical: beat stops whoever is in its way. For that it has to wait in place, not to come back."""
    with work(self, "books"):
        bookings_before = Booking.objects.count()
        time.sleep(0.4)
        Closing.objects.create(bookings_before=bookings_before, bookings_after=Booking.objects.count())
    return "closed"
