"""What must hold in the end, read from the data alone: nothing here knows of locks.

Every check is told how many tasks of its scene were done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.db.models import F, QuerySet, Sum
from django.db.models.functions import Coalesce

from example_project.shop.models import (
    Account,
    Analysis,
    Booking,
    Closing,
    Entry,
    Import,
    Invoice,
    Supplier,
    Transfer,
)
from example_project.shop.tasks import BOOKINGS


@dataclass(frozen=True)
class Finding:
    """What was found in the data, in words, and whether that is as it must be."""

    says: str
    holds: bool


def reports(done: int) -> Finding:
    most = most_at_once("nightly_report")
    return Finding(f"at most {most} at once", most <= 1)


def supplier_imports(done: int) -> Finding:
    most = most_at_once("import_supplier")
    counted = total(Supplier.objects.all(), "products")
    imported = total(Import.objects.all(), "products")
    return Finding(
        f"at most {most} per supplier, {counted} of {imported} products counted",
        most <= 1 and counted == imported and Import.objects.count() == done,
    )


def catalogue(done: int) -> Finding:
    moments = list(running("bulk_import", "analyse_catalogue"))
    importers = max((now["bulk_import"] for now in moments), default=0)
    disturbed = any(now["analyse_catalogue"] and now.total() > 1 for now in moments)
    moved = Analysis.objects.exclude(products_before=F("products_after")).count()
    return Finding(
        f"analysis {'disturbed' if disturbed or moved else 'alone'}, up to {importers} importers together",
        not disturbed and not moved,
    )


def transfers(done: int) -> Finding:
    most = most_at_once("transfer")
    accounts = Account.objects.all()
    wrong = [account.name for account in accounts if account.balance != balance_by_transfers(account)]
    lost = total(accounts, "opening_balance") - total(accounts, "balance")
    return Finding(
        f"at most {most} per account, {'wrong: ' + ', '.join(wrong) if wrong else 'every balance is right'}",
        most <= 1 and not wrong and not lost and Transfer.objects.count() == done,
    )


def exports(done: int) -> Finding:
    most = most_at_once("export_orders")
    return Finding(f"at most {most} per customer", most <= 3)


def invoices(done: int) -> Finding:
    numbers = sorted(Invoice.objects.values_list("number", flat=True))
    is_gapless = numbers == list(range(1, len(numbers) + 1))
    return Finding(
        f"{len(numbers)} numbers, {'no gap, none twice' if is_gapless else f'not gapless: {numbers}'}",
        is_gapless and len(numbers) == done and most_at_once("issue_invoice") <= 1,
    )


def books(done: int) -> Finding:
    closings = Closing.objects.count()
    moved = Closing.objects.exclude(bookings_before=F("bookings_after")).count()
    reconciled, torn = divmod(Booking.objects.count(), BOOKINGS)
    stopped = Entry.objects.filter(task="reconcile", what="stopped").count()
    return Finding(
        f"books {'moved' if moved or torn else 'stood still'}, {stopped} stopped for the close, done later",
        not moved and not torn and closings + reconciled == done,
    )


def running(*tasks: str) -> Iterator[Counter[str]]:
    """How many of these tasks were at work, after each time that one began or ended."""
    now: Counter[str] = Counter()
    for entry in Entry.objects.filter(task__in=tasks, what__in=("starts", "ends")).order_by("id"):
        now[entry.task] += 1 if entry.what == "starts" else -1
        yield now.copy()


def most_at_once(task: str) -> int:
    """How many runs of this task were at work on one and the same resource at once, at most."""
    now: Counter[str] = Counter()
    most = 0
    for entry in Entry.objects.filter(task=task, what__in=("starts", "ends")).order_by("id"):
        now[entry.resource] += 1 if entry.what == "starts" else -1
        most = max(most, now[entry.resource])
    return most


def balance_by_transfers(account: Account) -> int:
    return account.opening_balance + total(account.received, "amount") - total(account.sent, "amount")


def total(rows: QuerySet[Any], column: str) -> int:
    return rows.aggregate(total=Coalesce(Sum(column), 0))["total"]
