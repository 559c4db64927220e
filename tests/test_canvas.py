"""What Celery alone makes of tasks that end without a result, and of signals that refuse."""

import pytest
from celery import VERSION, chain, chord, group, states
from celery.exceptions import ChordError

from tests.canvas_tasks import errs, ignores, is_refused, plain, rejects
from tests.celery_app import app
from tests.conftest import running_worker
from tests.models import Entry


@pytest.fixture(scope="module")
def _worker(django_db_setup, django_db_blocker):
    app.control.purge()
    with django_db_blocker.unblock(), running_worker("celery", pool="solo", TASKS="canvas_tasks") as worker:
        yield worker


@pytest.fixture
def worker(_worker, rival):
    return _worker


def let_everything_run():
    """A solo worker takes one message after the other: what was sent before the second one has run."""
    for _ in range(2):
        plain.delay(key="sentinel").get(timeout=20)


def bodies(key):
    return Entry.objects.filter(key=key, what="begins").count()


class TestIgnore:
    def test_its_state_stays_what_it_was(self, worker):
        result = ignores.delay()
        let_everything_run()
        assert bodies("ignores") == 1
        assert result.state == states.STARTED

    def test_the_rest_of_its_chain_never_begins(self, worker):
        last = chain(ignores.si(), plain.si(key="rest"))()
        let_everything_run()
        assert last.state == states.PENDING
        assert not bodies("rest")

    def test_its_links_are_not_called(self, worker):
        ignores.apply_async(link=plain.si(key="linked"), link_error=plain.si(key="linked"))
        let_everything_run()
        assert not bodies("linked")

    def test_its_group_is_never_ready(self, worker):
        result = group(ignores.si(), plain.si(1))()
        let_everything_run()
        assert [one.ready() for one in result] == [False, True]
        assert not result.ready()

    def test_the_body_of_its_chord_is_never_called(self, worker):
        result = chord([ignores.si(), plain.si(1)])(plain.si(key="body"))
        let_everything_run()
        assert result.state == states.PENDING
        assert not bodies("body")


@pytest.mark.parametrize(
    "task",
    [
        errs,
        pytest.param(
            rejects, marks=pytest.mark.skipif(VERSION < (5, 7), reason="before, it was as with Ignore")
        ),
    ],
)
class TestFailure:
    def test_the_rest_of_its_chain_fails_without_having_begun(self, worker, task):
        first = task.si()
        first.link_error(plain.si(key="linked"))
        last = chain(first, plain.si(key="rest"))()
        let_everything_run()
        assert last.parent.state == last.state == states.FAILURE
        assert not bodies("rest")
        assert bodies("linked") == 1

    def test_its_group_is_ready_and_the_body_of_its_chord_fails(self, worker, task):
        grouped = group(task.si(), plain.si(1))()
        result = chord([task.si(), plain.si(1)])(plain.si(key="body"))
        let_everything_run()
        assert grouped.ready()
        assert result.state == states.FAILURE
        assert isinstance(result.result, ChordError)
        assert not bodies("body")


def test_what_a_receiver_raises_before_a_task_does_not_keep_its_body_from_running(worker):
    assert is_refused.delay().get(timeout=20) == "the body ran"
    assert bodies("is refused") == 1
    assert "the lock is taken" in worker.log
