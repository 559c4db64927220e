"""Raising an error in a body, in this very process."""

import signal
import threading
import time

import pytest
from django.db import connection, transaction

from celery_pglock import LockLost, interruptions
from celery_pglock.interruptions import SIGNAL, Interruption, can_interrupt

pytestmark = pytest.mark.skipif(SIGNAL is None, reason="real-time signals are Linux's")


@pytest.fixture(autouse=True)
def _handler(monkeypatch):
    monkeypatch.setattr("celery_pglock.interruptions.AGAIN_AFTER", 0.3)
    before = signal.getsignal(SIGNAL)
    assert can_interrupt()
    yield
    signal.signal(SIGNAL, before)
    assert not interruptions._running


def insist(interruption, seconds):
    """Order it time and again, as the watcher does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        interruption.order(LockLost("k"))
        time.sleep(0.05)


def run(body, seconds=1.0):
    interruption = Interruption()
    ordering = threading.Thread(target=insist, args=[interruption, seconds])
    ordering.start()
    try:
        return interruption.run(body, [interruption], {})
    finally:
        ordering.join()


def sleep_in_pieces(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


def test_a_body_is_interrupted():
    with pytest.raises(LockLost):
        run(lambda _: sleep_in_pieces(5))


def test_an_error_that_was_swallowed_comes_again():
    seen = []

    def swallow(_):
        for _ in range(2):
            try:
                sleep_in_pieces(5)
            except LockLost:  # noqa: PERF203 - what it is about
                seen.append(time.monotonic())

    run(swallow)
    assert seen[1] - seen[0] >= 0.3


def test_a_body_is_left_alone_while_it_handles_the_error():
    def handle(_):
        try:
            sleep_in_pieces(5)
        except LockLost:
            sleep_in_pieces(0.6)
            return "handled"

    assert run(handle) == "handled"


def test_a_body_that_knows_is_left_the_time_to_end():
    def know(interruption):
        interruption.was_made()
        sleep_in_pieces(0.2)
        return "ended"

    assert run(know) == "ended"


def test_what_is_over_is_not_interrupted():
    interruption = Interruption()
    assert interruption.run(lambda: "done", [], {}) == "done"
    interruption.order(LockLost("k"))
    sleep_in_pieces(0.1)


def test_an_inner_body_and_then_the_outer_one_are_interrupted():
    told = []

    def outer(interruption):
        with pytest.raises(LockLost, match="'k'"):
            try:
                interruption_of_inner.run(sleep_in_pieces, [5], {})
            finally:
                told.append("inner")
        with pytest.raises(LockLost):
            sleep_in_pieces(5)
        told.append("outer")

    interruption_of_inner = Interruption()
    ordering = threading.Thread(target=insist, args=[interruption_of_inner, 0.2])
    ordering.start()
    run(outer)
    ordering.join()
    assert told == ["inner", "outer"]


def test_djangos_own_commit_is_not_torn(transactional_db):
    table = "CREATE TABLE slow (id int); CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$"
    table += " BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;"
    table += " CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED"
    table += " FOR EACH ROW EXECUTE FUNCTION slow()"
    with connection.cursor() as cursor:
        cursor.execute(table)

    def commits_slowly(_):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("INSERT INTO slow VALUES (1)")
        sleep_in_pieces(5)

    try:
        with pytest.raises(LockLost):
            run(commits_slowly, seconds=2.0)
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM slow")
            assert cursor.fetchone() == (1,)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP TABLE slow; DROP FUNCTION slow()")


def test_another_threads_body_is_not_interrupted():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(can_interrupt()))
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_signal_that_is_somebody_elses_is_left_alone(caplog):
    def theirs(*_):
        pass

    signal.signal(SIGNAL, theirs)
    assert not can_interrupt()
    assert signal.getsignal(SIGNAL) is theirs
    assert "has another handler" in caplog.text
