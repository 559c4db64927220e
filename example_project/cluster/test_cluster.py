"""What the shop relies on when its tasks run on more than one worker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.states import RETRY
from django.db import transaction
from pytest_celery import CeleryTestWorker

from celery_pglock import model
from example_project.cluster.conftest import Send
from example_project.shop.models import Entry, Report, Supplier
from example_project.shop.tasks import SKIPPED, import_supplier, nightly_report

PATIENCE = 60.0

# Far from the 30 seconds after which the server gives up on a host that has vanished.
AT_ONCE = 5.0


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Poll until the condition holds, and give what it gave."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, f"not within {seconds} s"
        time.sleep(0.02)
    return found


@pytest.fixture
def supplier() -> Supplier:
    return Supplier.objects.create(name=uuid.uuid4().hex)


@contextmanager
def imports_kept_from_their_end(supplier: Supplier) -> Iterator[None]:
    """An import writes its supplier's row last, and does not get it."""
    with transaction.atomic():
        Supplier.objects.select_for_update().get(pk=supplier.pk)
        yield


@contextmanager
def reports_kept_from_their_end() -> Iterator[None]:
    with transaction.atomic():
        assert model(Report)
        yield


def work_on(supplier: Supplier) -> list[tuple[str, str]]:
    """What began and ended on it, in order, and on which worker."""
    entries = Entry.objects.filter(resource=f"supplier {supplier.name}").order_by("id")
    return [(entry.what, entry.worker) for entry in entries]


def test_two_workers_never_work_for_one_supplier_at_once(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send, supplier: Supplier
) -> None:
    results = [send(import_supplier, supplier.name, to=worker) for worker in (north, south, north, south)]
    assert [result.get(timeout=PATIENCE) for result in results] == ["imported"] * 4
    work = work_on(supplier)
    assert [what for what, _ in work] == ["starts", "ends"] * 4
    assert {worker for _, worker in work} == {"north", "south"}


def test_a_report_is_skipped_while_another_worker_writes_one(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send
) -> None:
    with reports_kept_from_their_end():
        written = send(nightly_report, to=north)
        wait_until(nightly_report.lock_for().is_held)
        assert send(nightly_report, to=south).get(timeout=PATIENCE) == SKIPPED
    assert written.get(timeout=PATIENCE) == "reported"


def test_the_log_of_whoever_skips_names_the_holder(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send
) -> None:
    with reports_kept_from_their_end():
        written = send(nightly_report, to=north)
        wait_until(nightly_report.lock_for().is_held)
        skipped = send(nightly_report, to=south)
        south.assert_log_exists(
            f"[{skipped.id}] skipped: lock 'nightly_report' is held by"
            f" nightly_report [{written.id}] on {north.hostname()}"
        )
    assert written.get(timeout=PATIENCE) == "reported"


def test_an_import_that_finds_its_supplier_taken_comes_back_and_runs(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send, supplier: Supplier
) -> None:
    with imports_kept_from_their_end(supplier):
        first = send(import_supplier, supplier.name, to=north)
        wait_until(import_supplier.lock_for(supplier.name).is_held)
        second = send(import_supplier, supplier.name, to=south)
        wait_until(lambda: second.state == RETRY)
    assert first.get(timeout=PATIENCE) == second.get(timeout=PATIENCE) == "imported"
    assert work_on(supplier) == [
        ("starts", "north"),
        ("ends", "north"),
        ("starts", "south"),
        ("ends", "south"),
    ]


def test_a_killed_worker_frees_its_lock_and_the_other_one_runs_its_task(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send, supplier: Supplier
) -> None:
    lock = import_supplier.lock_for(supplier.name)
    with imports_kept_from_their_end(supplier):
        result = send(import_supplier, supplier.name)
        (holder,) = wait_until(lock.holders)
        killed, survivor = (north, south) if holder.worker == north.hostname() else (south, north)
        wait_until(lambda: work_on(supplier) == [("starts", killed.worker_name)])
        killed.kill()
        wait_until(lambda: holder.pid not in {one.pid for one in lock.holders()}, seconds=AT_ONCE)
    assert result.get(timeout=PATIENCE) == "imported"
    assert work_on(supplier)[1:] == [("starts", survivor.worker_name), ("ends", survivor.worker_name)]


def test_a_worker_that_was_restarted_locks_as_before(
    north: CeleryTestWorker, south: CeleryTestWorker, send: Send
) -> None:
    with reports_kept_from_their_end():
        written = send(nightly_report, to=north)
        wait_until(nightly_report.lock_for().is_held)
        south.restart()
        assert send(nightly_report, to=south).get(timeout=PATIENCE) == SKIPPED
    assert written.get(timeout=PATIENCE) == "reported"
    assert send(nightly_report, to=south).get(timeout=PATIENCE) == "reported"
