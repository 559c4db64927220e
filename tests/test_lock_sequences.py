"""ExclusiveLock and ShareLock: counted, in the order given, told of their loss."""

import os
import pickle
import signal
import threading

import pytest
from django.db import connection, transaction

from celery_pglock import (
    ExclusiveLock,
    LockLost,
    LockMisuse,
    LockNotAcquired,
    LockNotHeld,
    ShareLock,
    advisory,
    timeout,
)
from celery_pglock.hooks import _leave_nothing_behind
from celery_pglock.keys import key
from celery_pglock.pool import pool
from tests.conftest import Rival, in_another_thread, wait_until
from tests.worker_tasks import app

BOTH = pytest.mark.parametrize("lock_class", [ExclusiveLock, ShareLock])


def terminate(rival):
    """End the thread's lock session, and wait until it has ended."""
    assert rival.ask("SELECT pg_terminate_backend(%s, 5000)", pool().leased["default"].backend_pid)


@BOTH
def test_all_identifiers_are_held_in_the_block_which_gets_the_lock(rival, lock_class):
    identifiers = [(0, 0), 0, 1, "text", -5, (-(2**31), 2**31 - 1), 2**63 - 1]
    lock = lock_class(*identifiers)
    assert not lock.locked()
    with lock as given:
        assert given is lock
        assert lock.locked()
        for identifier in identifiers:
            assert rival.sees_held(identifier) == 1
            assert not rival.could_take(identifier)
            assert rival.could_take(identifier, shared=True) is (lock_class is ShareLock)
    assert not lock.locked()
    assert rival.sees_advisory_locks() == 0


def test_a_pair_and_an_int_are_different_locks(rival):
    with ExclusiveLock((7, 9)):
        assert rival.could_take((7 << 32) + 9)
        assert not rival.could_take((7, 9))


def test_an_empty_sequence_is_counted_too(rival):
    lock = ExclusiveLock()
    with lock, lock:
        assert lock.locked()
        assert lock.acquire(blocking=False)
        lock.release()
    assert not lock.locked()
    with pytest.raises(LockNotHeld):
        lock.release()
    assert not pool().leased


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), ((5, 5), 2, "x", 1)])
def test_they_are_taken_in_the_order_given(rival, order):
    rival.take(order[-1])
    lock = ExclusiveLock(*order)
    waiting = threading.Thread(target=lambda: lock.acquire() and lock.release())
    waiting.start()
    wait_until(lambda: rival.sees_held(order[-1], granted=False))
    assert [rival.sees_held(identifier) for identifier in order[:-1]] == [1] * (len(order) - 1)
    rival.give_back(order[-1])
    waiting.join()
    rival.take(order[0])
    waiting = threading.Thread(target=lambda: lock.acquire() and lock.release())
    waiting.start()
    wait_until(lambda: rival.sees_held(order[0], granted=False))
    assert rival.sees_advisory_locks() == 2
    rival.give_back(order[0])
    waiting.join()


def test_one_that_is_named_twice_is_taken_once(rival, pooled):
    with ExclusiveLock(1, 2, 1, 1):
        assert rival.sees_advisory_locks() == 2
    assert rival.sees_advisory_locks() == 0


@BOTH
def test_it_is_free_when_it_was_released_as_often_as_acquired(rival, pooled, lock_class):
    lock = lock_class("counted", 2)
    assert lock.acquire()
    assert lock.acquire(False)
    with lock:
        assert lock.acquire(blocking=True)
        lock.release()
    for _ in range(2):
        assert lock.locked()
        assert not rival.could_take("counted")
        lock.release()
    assert not lock.locked()
    assert rival.could_take("counted")
    with pytest.raises(LockNotHeld, match="'counted, 2'"):
        lock.release()
    with pytest.raises(RuntimeError):
        lock.release()


def test_each_instance_counts_for_itself(rival, pooled):
    first, second = ExclusiveLock("k"), ExclusiveLock("k")
    assert first == second
    with first:
        assert not second.locked()
        with pytest.raises(LockNotHeld):
            second.release()
        with second, ShareLock("k"):
            assert second.locked()
        assert not rival.could_take("k")
        assert not rival.could_take("k", shared=True)
    assert rival.could_take("k")


def test_each_thread_counts_for_itself(rival):
    lock = ExclusiveLock("k")
    with lock:
        assert in_another_thread(lock.locked) is False
        assert in_another_thread(lambda: lock.acquire(blocking=False)) is False

        def release():
            with pytest.raises(LockNotHeld):
                lock.release()
            return True

        assert in_another_thread(release)
        assert lock.locked()
        assert not rival.could_take("k")


@BOTH
@pytest.mark.parametrize("position", [0, 1, 2])
def test_without_blocking_it_is_all_or_nothing(rival, pooled, lock_class, position):
    identifiers = [3, (1, 1), "x"]
    rival.take(identifiers[position])
    lock = lock_class(*identifiers)
    assert lock.acquire(blocking=False) is False
    assert not lock.locked()
    assert rival.sees_advisory_locks() == 1
    rival.give_back(identifiers[position])
    assert lock.acquire(blocking=False) is True
    lock.release()


def test_without_blocking_it_keeps_what_was_held_before(rival):
    rival.take("b")
    with ExclusiveLock("a") as lock:
        assert not ExclusiveLock("a", "b").acquire(blocking=False)
        assert lock.locked()
        assert not rival.could_take("a")
    assert rival.could_take("a")


def test_shared_holders_run_together_and_an_exclusive_one_alone(rival):
    rival.take("k", shared=True)
    with ShareLock("k"):
        assert not ExclusiveLock("other", "k").acquire(blocking=False)
    assert not ExclusiveLock("k").acquire(blocking=False)
    rival.give_back("k", shared=True)
    rival.take("k")
    assert not ShareLock("k").acquire(blocking=False)


def test_blocking_waits_until_it_is_free(rival):
    rival.take("k")

    def step_aside():
        wait_until(lambda: rival.sees_held("k", granted=False))
        rival.give_back("k")

    stepping_aside = threading.Thread(target=step_aside)
    stepping_aside.start()
    with ExclusiveLock("k") as lock:
        assert lock.locked()
    stepping_aside.join()


def test_a_timeout_that_runs_out_is_an_error_with_the_holder(rival):
    rival.take("b")
    lock = ExclusiveLock("a", "b")
    pid = rival.ask("SELECT pg_backend_pid()")
    with timeout(0.1):
        with pytest.raises(LockNotAcquired, match=f"'a, b' .* lock_timeout ran out; .*backend {pid}"):
            lock.acquire()
        with pytest.raises(LockNotAcquired), lock:
            pytest.fail("it must not run")
    assert not lock.locked()
    assert rival.sees_advisory_locks() == 1


def test_the_victim_of_a_deadlock_is_told_and_keeps_nothing_of_it(rival):
    rival.connection.execute("SET deadlock_timeout = '20s'")
    rival.take("b")
    lock = ExclusiveLock("a", "b")

    other = Rival()

    def cross():
        wait_until(lambda: other.sees_held("b", granted=False))
        rival.ask("SELECT pg_advisory_lock(%s)::text", *key("a").arguments)

    crossing = threading.Thread(target=cross)
    crossing.start()
    with pytest.raises(LockNotAcquired, match="deadlock"):
        lock.acquire()
    crossing.join()
    other.connection.close()
    assert not lock.locked()


def test_djangos_connection_and_its_transactions_do_not_touch_it(rival):
    with ExclusiveLock("k") as lock:
        connection.close()
        with transaction.atomic():
            transaction.set_rollback(True)
        assert lock.locked()
        assert not rival.could_take("k")


class TestLosing:
    def test_a_session_that_was_ended_is_known_at_once_and_left_quietly(self, rival):
        lock = ExclusiveLock("k", 2)
        with lock, lock:
            assert lock.locked()
            terminate(rival)
            assert not lock.locked()
        with pytest.raises(LockNotHeld):
            lock.release()

    @pytest.mark.parametrize("attempt", range(5))
    def test_it_is_known_without_the_watcher(self, rival, monkeypatch, attempt):
        with ExclusiveLock("k") as lock:
            monkeypatch.setattr("celery_pglock.lifelines.Lifeline.listen", lambda *_: None)
            terminate(rival)
            assert not lock.locked()

    def test_releasing_by_hand_is_quiet_too(self, rival):
        lock = ExclusiveLock("k")
        lock.acquire()
        lock.acquire()
        terminate(rival)
        lock.release()
        lock.release()
        with pytest.raises(LockNotHeld):
            lock.release()

    @BOTH
    @pytest.mark.parametrize("blocking", [True, False])
    def test_acquiring_anew_takes_it_really(self, rival, pooled, lock_class, blocking):
        lock = lock_class("k")
        lock.acquire()
        lock.acquire()
        terminate(rival)
        assert lock.acquire(blocking=blocking)
        assert lock.locked()
        for _ in range(3):
            assert lock.locked()
            assert not rival.could_take("k")
            lock.release()
        assert not lock.locked()
        assert rival.could_take("k")
        with pytest.raises(LockNotHeld):
            lock.release()

    def test_anew_it_is_not_had_while_somebody_else_has_it(self, rival):
        lock = ExclusiveLock("k")
        with lock:
            terminate(rival)
            rival.take("k")
            assert not lock.acquire(blocking=False)
            assert not lock.locked()
            rival.give_back("k")

    def test_an_advisory_on_the_same_session_still_learns_of_its_loss(self, rival):
        lock = ExclusiveLock("k")
        with pytest.raises(LockLost, match="'other'"), advisory("other"), lock:
            terminate(rival)
            assert lock.acquire()
            assert lock.locked()
            lock.release()

    def test_a_body_that_fails_keeps_its_error(self, rival):
        with pytest.raises(ValueError, match="body"), ExclusiveLock("k"):
            terminate(rival)
            raise ValueError("body")

    def test_a_body_that_released_too_often_keeps_its_error(self, rival, caplog):
        with pytest.raises(ValueError, match="body"), ExclusiveLock("k") as lock:
            lock.release()
            raise ValueError("body")
        assert "released too often" in caplog.text
        with pytest.raises(LockNotHeld), lock:
            lock.release()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_does_not_hold_it_and_harms_no_parent(rival):
    lock = ExclusiveLock("k")
    is_speaking, is_forked = threading.Event(), threading.Event()

    def speak(session):
        with session._line.speaking:
            is_speaking.set()
            is_forked.wait(20)

    with lock:
        # The watcher may be at it, and is not there in the child to end it.
        watching = threading.Thread(target=speak, args=[pool().leased["default"]])
        watching.start()
        is_speaking.wait(20)
        child = os.fork()
        is_forked.set()
        if not child:
            # What goes wrong here must not become a second run of the tests.
            signal.alarm(10)
            try:
                answers = [not lock.locked(), not lock.acquire(blocking=False), not lock.locked()]
                lock.release()
                try:
                    lock.release()
                except LockNotHeld:
                    answers.append(True)
                os._exit(0 if answers == [True] * 4 else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        watching.join()
        assert lock.locked()
        assert not rival.could_take("k")
    assert rival.could_take("k")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_can_acquire_it_anew(rival):
    lock = ExclusiveLock("k")
    lock.acquire()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.read(read, 1)
            lock.acquire()
            os._exit(0 if lock.locked() else 1)
        finally:
            os._exit(2)
    lock.release()
    os.write(write, b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(read)
    os.close(write)
    wait_until(lambda: rival.could_take("k"))


def test_what_a_task_left_is_not_counted_in_the_next(rival):
    lock = ExclusiveLock("k")
    lock.acquire()
    _leave_nothing_behind("id", app.tasks["tests.worker_tasks.skips"])
    assert not lock.locked()
    with lock:
        assert not rival.could_take("k")
    assert rival.could_take("k")
    with pytest.raises(LockNotHeld):
        lock.release()


def test_where_locks_are_turned_off_it_is_as_if_held(rival, pglock_settings):
    pglock_settings(ENABLED=False)
    rival.take("k")
    lock = ExclusiveLock("k")
    with lock:
        assert lock.locked()
        assert lock.acquire(blocking=False)
        assert not pool().leased
        lock.release()
    assert not lock.locked()
    with pytest.raises(LockNotHeld):
        lock.release()


def test_it_is_a_value():
    lock = ExclusiveLock("a", (1, 2), using="locks")
    assert repr(lock) == "ExclusiveLock('a', (1, 2), using='locks')"
    assert lock == pickle.loads(pickle.dumps(lock))  # noqa: S301 - our own
    assert lock != ExclusiveLock((1, 2), "a", using="locks")
    assert ExclusiveLock(1) != ShareLock(1)
    assert len({ExclusiveLock(1), ExclusiveLock(1), ExclusiveLock(2)}) == 2
    with pytest.raises(AttributeError):
        lock.using = "default"


@pytest.mark.parametrize(
    ("misuse", "cure"),
    [
        (lambda: ExclusiveLock(None), "not a lock id"),
        (lambda: ExclusiveLock(""), "not a lock id"),
        (lambda: ExclusiveLock(2**63), "int8"),
        (lambda: ShareLock((1, 2**31)), "int4"),
        (lambda: ShareLock(*range(257)), "257 lock ids at once are too many"),
        (lambda: ShareLock(1, using="sqlite").acquire(), "not PostgreSQL but sqlite"),
    ],
)
def test_misuse_is_refused_with_the_cure(transactional_db, misuse, cure):
    with pytest.raises(LockMisuse, match=cure):
        misuse()


@pytest.mark.parametrize("blocking", [True, False])
def test_as_many_as_are_allowed_can_be_taken(rival, pooled, blocking):
    lock = ExclusiveLock(*range(256))
    assert lock.acquire(blocking=blocking)
    assert rival.sees_advisory_locks() == 256
    lock.release()
    assert rival.sees_advisory_locks() == 0
