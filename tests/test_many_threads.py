"""One value, decorated or entered by many threads that are switched as often as Python can."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from django.db import connections

from celery_pglock import ExclusiveLock, Skip, advisory, timeout
from celery_pglock.timeouts import in_force

# How many attempts, over all tests of this file; `ENTRIES=100000` is the proof, and takes a minute or two.
ENTRIES = int(os.environ.get("ENTRIES", "5000"))
THREADS = 8
SKIPPED = "skipped"

pytestmark = [
    pytest.mark.long,
    pytest.mark.django_db(transaction=True, databases=["default", "locks"]),
    pytest.mark.timeout(60 + ENTRIES // 200),
]


class Room:
    """A body that notes who is in it, without a lock of its own: the interpreter's keeps a list whole."""

    def __init__(self):
        self.inside = []
        self.entries = 0
        self.doubles = []

    def work(self):
        me = object()
        self.inside.append(me)
        before = self.entries
        self._note_others()
        time.sleep(0)
        self.entries = before + 1
        self._note_others()
        self.inside.remove(me)
        return "done"

    def _note_others(self):
        if len(self.inside) != 1:
            self.doubles.append(len(self.inside))


@pytest.fixture(autouse=True)
def _switched_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def storm(attempt, attempts=ENTRIES // 5):
    """The answers of all threads, which stay alive in the block: with a thread its sessions would end."""
    answers, errors = [], []
    start = threading.Barrier(THREADS)
    over = threading.Event()
    ready = threading.Semaphore(0)

    def run(number):
        try:
            start.wait(30)
            for _ in range(attempts // THREADS):
                answers.append(attempt(number))  # noqa: PERF401 - an append that another thread sees
        except BaseException as error:
            errors.append(error)
            raise
        finally:
            ready.release()
            over.wait()
            connections.close_all()

    threads = [threading.Thread(target=run, args=[number], daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            ready.acquire()
        assert not errors
        assert len(answers) == attempts // THREADS * THREADS
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_shared_decorator_that_skips_lets_one_thread_in_and_leaves_nothing(rival, pooled):
    room = Room()
    guarded = advisory("x", timeout=0, side_effect=Skip(SKIPPED))(room.work)
    with storm(lambda _: guarded()) as answers:
        assert rival.sees_advisory_locks() == 0
        assert rival.could_take("x")
        assert guarded() == "done"
    assert not room.doubles
    assert room.entries == answers.count("done") + 1
    assert answers.count("done") + answers.count(SKIPPED) == len(answers)
    assert answers.count(SKIPPED)


def test_a_shared_decorator_that_waits_lets_everybody_in_one_after_another(rival, pooled):
    room = Room()
    guarded = advisory("x", "y")(room.work)
    with storm(lambda _: guarded()) as answers:
        assert rival.sees_advisory_locks() == 0
        assert rival.could_take("x")
    assert not room.doubles
    assert room.entries == len(answers) == answers.count("done")


def test_a_shared_block_in_itself_lets_one_thread_in_and_leaves_nothing(rival, pooled):
    room = Room()
    lock = advisory("x", timeout=0)

    def enter(_):
        with lock as acquired:
            if not acquired:
                time.sleep(0)
                return SKIPPED
            with lock as again:
                assert again
            return room.work()

    with storm(enter) as answers:
        assert rival.sees_advisory_locks() == 0
        assert rival.could_take("x")
    assert not room.doubles
    assert room.entries == answers.count("done") > 0


def test_a_shared_exclusive_lock_is_counted_for_each_thread_apart(rival, pooled):
    room = Room()
    lock = ExclusiveLock("x", 7)

    def enter(number):
        if number % 2 and not lock.acquire(blocking=False):
            assert not lock.locked()
            return SKIPPED
        with lock:
            assert lock.locked()
            done = room.work()
        if number % 2:
            assert lock.locked()
            lock.release()
        assert not lock.locked()
        return done

    with storm(enter) as answers:
        assert rival.sees_advisory_locks() == 0
        assert rival.could_take("x")
        assert rival.could_take(7)
    assert not room.doubles
    assert room.entries == answers.count("done") > 0


def test_a_shared_timeout_is_in_force_in_each_call_and_gives_each_thread_its_own_back():
    def shown():
        with connections["default"].cursor() as cursor:
            cursor.execute("SHOW lock_timeout")
            return cursor.fetchone()[0]

    shared = timeout(3)
    look = shared(shown)

    def enter(number):
        mine = f"{number + 10}s"
        with connections["default"].cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{mine}'")
        with shared, shared:
            seen = shown(), look(), in_force("default")
        return (*seen, in_force("default").name, shown() == mine)

    with storm(enter) as answers:
        assert set(answers) == {("3s", "3s", 3.0, "UNSET", True)}
