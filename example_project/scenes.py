"""The scenes of the shop's day: what is sent, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, islice

from celery.canvas import Signature

from example_project.shop import invariants, tasks
from example_project.shop.invariants import Finding
from example_project.shop.opening import ACCOUNTS, SUPPLIERS

# Seconds; all the scenes are played once in it, the reports by beat.
ROUND = 6.5


@dataclass(frozen=True)
class Scene:
    """A few tasks that must not get into each other's way."""

    name: str
    tasks: tuple[str, ...]
    option: str
    story: str
    check: Callable[[int], Finding]


SCENES = (
    Scene(
        "report",
        ("nightly_report",),
        "Skip()",
        "beat sends it every 2 s; while one runs, the next is skipped",
        invariants.reports,
    ),
    Scene(
        "import",
        ("import_supplier",),
        "Retry()",
        "one at a time per supplier; who comes too early comes back later",
        invariants.supplier_imports,
    ),
    Scene(
        "catalogue",
        ("bulk_import", "analyse_catalogue"),
        "lock_shared, lock_timeout",
        "importers share it; the analysis waits to be alone, and newcomers are held off",
        invariants.catalogue,
    ),
    Scene(
        "transfer",
        ("transfer",),
        "two keys",
        "both accounts are locked at once, whoever comes waits for both",
        invariants.transfers,
    ),
    Scene(
        "export",
        ("export_orders",),
        "lock_limit=3",
        "three at a time per customer; the fourth comes back later",
        invariants.exports,
    ),
    Scene(
        "invoice",
        ("issue_invoice",),
        "XactAdvisoryTask",
        "numbers without gaps, although one without an address fails and rolls back",
        invariants.invoices,
    ),
    Scene(
        "close",
        ("reconcile", "close_month"),
        "lock_priority",
        "critical: beat stops the reconciliation in its way, which begins anew later",
        invariants.books,
    ),
)


def work(seconds: float) -> Iterator[tuple[float, Signature]]:
    """What to send, and how many seconds after the start; a short time has a short round."""
    length = min(ROUND, seconds)
    for number in count():
        for offset, signature in one_round(number):
            moment = (number + offset / ROUND) * length
            if moment >= seconds:
                return
            yield moment, signature


def one_round(number: int) -> Iterator[tuple[float, Signature]]:
    first, second, third = islice(cycle(ACCOUNTS), number, number + 3)
    supplier, other = islice(cycle(SUPPLIERS), number, number + 2)
    customer = ("ada", "grace", "edsger")[number % 3]

    yield 0.0, tasks.reconcile.s()
    yield 0.5, tasks.close_month.s()

    yield 0.0, tasks.bulk_import.s("north")
    yield 0.2, tasks.bulk_import.s("south")
    yield 0.7, tasks.analyse_catalogue.s()
    yield 1.2, tasks.bulk_import.s("west")

    yield 1.7, tasks.import_supplier.s(supplier)
    yield 1.9, tasks.import_supplier.s(other)
    yield 2.2, tasks.import_supplier.s(supplier)

    yield 3.0, tasks.transfer.s(first, second, 70)
    yield 3.0, tasks.transfer.s(second, first, 20)
    yield 3.1, tasks.transfer.s(second, third, 30)

    for _ in range(5):
        yield 4.3, tasks.export_orders.s(customer)

    yield 5.5, tasks.issue_invoice.s(customer)
    yield 5.5, tasks.issue_invoice.s("alan")
    yield 5.5, tasks.issue_invoice.s(customer)
