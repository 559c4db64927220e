"""What is said of a task whose lock is taken while others wait for its result."""

import pytest
from celery import chain, chord

from tests.celery_app import app
from tests.chord_tasks import (
    collects,
    gives,
    ignored,
    rejected,
    replaced,
    skipped_in_a_chain,
    skipped_with_none,
    skipped_with_result,
)
from tests.conftest import running_worker, wait_until


@pytest.fixture(scope="module")
def _worker(django_db_setup, django_db_blocker):
    app.control.purge()
    with django_db_blocker.unblock(), running_worker("celery", pool="threads", TASKS="chord_tasks") as worker:
        yield worker


@pytest.fixture
def worker(_worker, rival):
    assert rival.take("k")
    return _worker


def sent(task):
    return chord([task.s("k"), gives.s(1)], collects.s()).delay()


def lines(worker, *words):
    return [line for line in worker.log.splitlines() if all(word in line for word in words)]


def test_a_result_that_nobody_declared_is_told_once_of_each_task(worker):
    for _ in range(2):
        assert sent(skipped_with_none).get(timeout=20) == [None, 1]
    (line,) = lines(worker, "skipped_with_none", "hands None to the body of its chord")
    assert "WARNING" in line
    assert "Skip(result=...)" in line


def test_a_result_that_was_declared_is_not_told(worker):
    assert sent(skipped_with_result).get(timeout=20) == ["skipped", 1]
    assert not lines(worker, "skipped_with_result", "hands None")


def test_outside_of_a_chord_nothing_is_told(worker):
    assert chain(skipped_in_a_chain.s("k"), gives.s()).delay().get(timeout=20) is None
    assert not lines(worker, "skipped_in_a_chain", "hands None")


@pytest.mark.parametrize(("task", "error"), [(ignored, "Ignore"), (rejected, "Reject")])
def test_a_side_effect_that_leaves_a_canvas_hanging_is_told(worker, task, error):
    said = f"was ended by {error}, raised by its side effect"
    alone = task.delay("k")
    for canvas in ("chord", "chain"):
        if canvas == "chord":
            sent(task)
        else:
            chain(task.s("k"), gives.s()).delay()
        (line,) = wait_until(lambda canvas=canvas: lines(worker, task.name, said, f"its {canvas} never runs"))
        assert "ERROR" in line
    assert not lines(worker, alone.id, said)


def test_a_side_effect_that_replaces_its_task_leaves_nothing_hanging(worker):
    assert sent(replaced).get(timeout=20) == ["replaced", 1]
    assert not lines(worker, replaced.name, "was ended by")
