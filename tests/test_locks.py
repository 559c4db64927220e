"""Advisory locks: taken, waited for, given back, asked about."""

import asyncio
import copy
import pickle
import sys
import threading
import time
from datetime import timedelta

import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import DataError, OperationalError, connection, transaction

from celery_pglock import (
    ExclusiveLock,
    LockLost,
    LockMisuse,
    LockNotAcquired,
    LockNotHeld,
    Raise,
    Retry,
    Return,
    ShareLock,
    SideEffect,
    Skip,
    advisory,
)
from celery_pglock.claims import Claim
from celery_pglock.keys import key
from celery_pglock.lifelines import Lifeline
from celery_pglock.pool import pool
from tests.conftest import ADVISORY_HERE, in_another_thread, wait_until

KEYS = ["text", 7, (1, -2), -5]


@pytest.mark.parametrize("identifier", KEYS)
def test_a_lock_is_held_inside_the_block_and_free_after_it(rival, identifier):
    with advisory(identifier) as acquired:
        assert acquired is True
        assert rival.sees_held(identifier) == 1
        assert not rival.could_take(identifier)
    assert rival.could_take(identifier)


def test_the_key_of_a_text_is_django_pglocks(rival):
    with advisory("hello"):
        held = rival.ask(f"SELECT (classid::bigint, objid::bigint)::text FROM pg_locks WHERE {ADVISORY_HERE}")
    assert held == "(245608543,3125670444)"


def test_closing_djangos_connection_does_not_release_the_lock(rival):
    with advisory("invoice:7"):
        connection.close()
        assert not rival.could_take("invoice:7")


def test_an_aborted_transaction_does_not_poison_the_lock(rival):
    with (
        pytest.raises(OperationalError),
        transaction.atomic(),
        advisory("invoice:7"),
        connection.cursor() as cursor,
    ):
        cursor.execute("SET LOCAL statement_timeout = 1; SELECT pg_sleep(1)")
    assert rival.could_take("invoice:7")


def test_shared_holders_run_together_and_an_exclusive_one_alone(rival):
    with advisory("report", shared=True):
        assert rival.could_take("report", shared=True)
        assert not rival.could_take("report")
    with advisory("report"):
        assert not rival.could_take("report", shared=True)


@pytest.mark.parametrize("xact", [False, True])
@pytest.mark.parametrize("timeout", [0, 0.05, timedelta(milliseconds=50)])
def test_a_taken_lock_is_not_acquired(rival, timeout, xact):
    rival.take("taken")
    with advisory("taken", timeout=timeout, xact=xact) as acquired:
        assert acquired is False
        assert rival.sees_held("taken") == 1


def test_a_slow_answer_to_who_did_not_want_to_wait_is_no_wait(rival, monkeypatch):
    ask = Lifeline.ask_again

    def slowly(*question, **options):
        time.sleep(0.02)
        return ask(*question, **options)

    rival.take("taken")
    monkeypatch.setattr(Lifeline, "ask_again", slowly)
    with pytest.raises(LockNotAcquired, match="without waiting") as refused:
        advisory("taken", timeout=0, side_effect=Raise).acquire()
    assert refused.value.waited == 0


def test_waiting_ends_at_the_timeout(rival):
    rival.take("taken")
    started = time.monotonic()
    assert not advisory("taken", timeout=0.5).acquire()
    assert 0.5 <= time.monotonic() - started < 5


@pytest.mark.parametrize("timeout", [None, 20])
def test_waiting_ends_when_the_lock_is_free(rival, timeout):
    rival.take("taken")
    waiting = threading.Thread(target=lambda: rival_steps_aside())

    def rival_steps_aside():
        wait_until(lambda: rival.sees_held("taken", granted=False))
        rival.give_back("taken")

    waiting.start()
    with advisory("taken", timeout=timeout) as acquired:
        assert acquired
    waiting.join()


def test_an_unset_timeout_keeps_the_lock_timeout_in_force(rival):
    database = connection.settings_dict["NAME"]
    rival.take("taken")
    rival.connection.execute(f'ALTER DATABASE "{database}" SET lock_timeout = 100')
    try:
        assert not advisory("taken").acquire()
        assert not advisory("taken", limit=1).acquire()
        for slot in key("taken").slots(2)[1:]:
            rival.take(slot)
        assert not advisory("taken", limit=2).acquire()
        connection.close()
        with transaction.atomic():
            assert not advisory("taken", xact=True).acquire()
            assert not advisory("taken", limit=2, xact=True).acquire()
    finally:
        rival.connection.execute(f'ALTER DATABASE "{database}" RESET lock_timeout')
        connection.close()


def test_the_timeout_covers_all_keys_together(rival):
    names = [name.name for name in advisory("a", "b", "c").keys]
    rival.take(names[0])
    rival.take(names[2])
    started = time.monotonic()
    stepping_aside = threading.Timer(1.5, lambda: rival.give_back(names[0]))
    stepping_aside.start()
    assert not advisory("a", "b", "c", timeout=2).acquire()
    stepping_aside.join()
    assert time.monotonic() - started < 3.3


@pytest.mark.parametrize("timeout", [0, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_several_keys_are_taken_all_or_none(rival, timeout, shared):
    lock = advisory("a", "b", 3, (4, 5), timeout=timeout, shared=shared)
    with lock as acquired:
        assert acquired
        assert rival.sees_advisory_locks() == 4
    last = lock.keys[-1]
    rival.take(last)
    with lock as acquired:
        assert not acquired
        assert rival.sees_advisory_locks() == 1
    assert rival.sees_advisory_locks() == 1


def test_a_refusal_keeps_what_the_thread_held_before(rival):
    first, second, third = (one.name for one in advisory("a", "b", "c").keys)
    with advisory(first), advisory(second, shared=True):
        rival.take(third)
        assert not advisory(first, second, third, timeout=0.1).acquire()
        assert not advisory(first, second, third, timeout=0).acquire()
        assert not rival.could_take(first)
        assert rival.could_take(second, shared=True)
        assert not rival.could_take(second)
    assert rival.could_take(first)
    assert rival.could_take(second)


def test_a_thread_re_enters_its_own_lock(rival):
    with advisory("again"):
        with advisory("again", timeout=0) as acquired, advisory("again", "more", timeout=0) as both:
            assert acquired
            assert both
        assert not rival.could_take("again")
        assert rival.could_take("more")
    assert rival.could_take("again")


def test_threads_do_not_share_what_they_hold():
    lock = advisory("shared value", timeout=0)
    with lock:
        assert in_another_thread(lock.acquire) is False


def test_nested_locks_live_on_one_session(rival):
    with advisory("outer"), advisory("inner"):
        assert rival.ask(f"SELECT count(DISTINCT pid) FROM pg_locks WHERE {ADVISORY_HERE}") == 1


def test_a_limit_lets_so_many_in(rival):
    lock = advisory("export", limit=3, timeout=0)
    slots = key("export").slots(3)
    with lock:
        assert rival.sees_held("export"), "slot 0 is the key itself"
        assert rival.take(slots[2])
        assert in_another_thread(lambda: lock.acquire() and (lock.release() or True))
        assert rival.take(slots[1])
        assert not in_another_thread(lock.acquire)
    rival.give_back(slots[1])
    assert lock.acquire()
    lock.release()


def test_a_limit_waits_by_polling(rival):
    for slot in key("export").slots(2):
        rival.take(slot)
    assert not advisory("export", limit=2, timeout=0.2).acquire()
    stepping_aside = threading.Timer(0.3, lambda: rival.give_back("export"))
    stepping_aside.start()
    with advisory("export", limit=2, timeout=20) as acquired:
        assert acquired
    stepping_aside.join()


@pytest.mark.parametrize("xact", [False, True])
def test_a_limit_on_several_keys_is_all_or_none(rival, xact):
    lock = advisory("a", "b", limit=2, timeout=0, xact=xact)
    for slot in lock.keys[1].slots(2):
        rival.take(slot)
    with lock as acquired:
        assert not acquired
        assert rival.sees_advisory_locks() == 2
    rival.give_back(lock.keys[1].slots(2)[1])
    rival.take(lock.keys[0])
    with lock as acquired:
        assert acquired
        assert rival.sees_held(lock.keys[1].slots(2)[1])
        assert rival.sees_held(lock.keys[0].slots(2)[1])
        assert rival.sees_advisory_locks() == 4
    assert rival.sees_advisory_locks() == 2


def test_a_limit_is_re_entered_in_its_slot(rival):
    lock = advisory("export", limit=2, timeout=0)
    with lock, lock:
        assert rival.sees_advisory_locks() == 1


def test_acquire_and_release_by_hand(rival):
    assert advisory("by hand").acquire()
    assert not rival.could_take("by hand")
    advisory("by hand").release()
    assert rival.could_take("by hand")


def test_releasing_what_is_not_held_is_an_error(rival):
    with pytest.raises(LockNotHeld, match="'by hand'"):
        advisory("by hand").release()
    rival.take("by hand")
    assert not advisory("by hand", timeout=0).acquire()
    with pytest.raises(RuntimeError):
        advisory("by hand", timeout=0).release()


def test_what_was_acquired_by_hand_is_not_released_by_a_block(rival):
    lock = advisory("k", timeout=0)
    rival.take("k")
    with lock as acquired:
        assert not acquired
        rival.give_back("k")
        assert lock.acquire()
    assert not rival.could_take("k")
    lock.release()
    assert rival.could_take("k")
    with pytest.raises(LockNotHeld), lock:
        lock.release()


def test_coroutines_which_share_a_thread_cannot_take_locks(transactional_db):
    async def take():
        with advisory("k"):
            pass

    async def ask():
        return advisory("k").is_held()

    for coroutine in (take, ask):
        with pytest.raises(SynchronousOnlyOperation, match="sync_to_async"):
            asyncio.run(coroutine())


def test_raise_raises_with_the_holder(rival):
    rival.take("taken")
    with pytest.raises(LockNotAcquired) as refused, advisory("taken", timeout=0, side_effect=Raise):
        pass
    assert refused.value.lock == "taken"
    pid = rival.ask("SELECT pg_backend_pid()")
    assert f"(backend {pid})" in str(refused.value)


def test_a_decorator_locks_by_the_functions_name(rival):
    @advisory(timeout=0)
    def close_books():
        """Close."""
        assert not rival.could_take(f"{__name__}.close_books")
        return "closed"

    assert close_books() == "closed"
    assert (close_books.__name__, close_books.__doc__) == ("close_books", "Close.")
    rival.take(f"{__name__}.close_books")
    with pytest.raises(LockNotAcquired):
        close_books()


def test_a_decorator_that_skips_does_not_run(rival):
    @advisory("taken", timeout=0, side_effect=Skip(result="skipped"))
    def never():
        raise AssertionError

    rival.take("taken")
    assert never() == "skipped"


def test_a_side_effect_of_your_own_decides(rival):
    class Note(SideEffect):
        def on_conflict(self, conflict):
            return f"{conflict.key} {conflict.attempt} {len(conflict.holders)} {conflict.reason}"

    @advisory("taken", timeout=0, side_effect=Note())
    def never():
        raise AssertionError

    rival.take("taken")
    assert never() == "taken 1 1 it is taken"


@pytest.mark.parametrize(
    ("misuse", "cure"),
    [
        (lambda: advisory().__enter__(), "needs at least one lock id"),
        (lambda: advisory().acquire(), "needs at least one lock id"),
        (lambda: advisory("x", side_effect=Skip).__enter__(), "for the decorator"),
        (lambda: advisory("x", side_effect=Skip).acquire(), "for the decorator"),
        (lambda: advisory("x", side_effect=Return)(lambda: None), "would run unlocked"),
        (lambda: advisory("x", side_effect=Retry), "Retry is for tasks"),
        (lambda: advisory("x", side_effect="Skip"), "must be a side effect"),
        (lambda: advisory("x", shared=True, limit=2), "not both"),
        (lambda: advisory("x", limit=0), "limit must be"),
        (lambda: advisory("x", limit=True), "limit must be"),
        (lambda: advisory(*range(257)), "257 lock ids at once are too many"),
        (lambda: advisory("x", timeout=-1), "timeout must be"),
        (lambda: advisory("x", xact=True).acquire(), "needs an open transaction"),
        (lambda: advisory("x", xact=True).release(), "ends with its transaction"),
        (lambda: advisory("x", using="sqlite").acquire(), "not PostgreSQL but sqlite"),
        (lambda: advisory("x")(int), "decorates functions"),
    ],
)
def test_misuse_is_refused_with_the_cure(transactional_db, misuse, cure):
    with pytest.raises(ValueError, match=cure) as refused:
        misuse()
    assert isinstance(refused.value, RuntimeError)


async def coroutine():
    pass


def generator():
    yield


async def asynchronous_generator():
    yield


@pytest.mark.parametrize("function", [coroutine, generator, asynchronous_generator])
def test_what_runs_after_its_call_is_refused(function):
    with pytest.raises(LockMisuse, match="before its body runs"):
        advisory("x")(function)


def test_a_lock_is_a_value():
    assert advisory("a", "b", timeout=1) == advisory("b", "a", timeout=timedelta(seconds=1))
    assert advisory("a") != advisory("a", shared=True)
    assert len({advisory("a"), advisory("a")}) == 1
    assert copy.copy(advisory("a")) == advisory("a") == pickle.loads(pickle.dumps(advisory("a")))  # noqa: S301
    with pytest.raises(AttributeError):
        advisory("a").limit = 2


def test_what_was_acquired_with_a_timeout_is_released_without(rival):
    assert advisory("x", timeout=0, side_effect=Raise).acquire()
    advisory("x").release()
    assert rival.could_take("x")
    assert advisory("x", timeout=0).acquire()
    for another in (advisory("x", shared=True), advisory("y"), advisory("x", limit=2)):
        with pytest.raises(LockNotHeld):
            another.release()
    advisory("x").release()


def enters(lock):
    with lock:
        raise AssertionError("the body ran")


@pytest.mark.parametrize(
    "take",
    [
        lambda: enters(advisory("x")),
        lambda: enters(advisory("x", xact=True)),
        lambda: enters(ExclusiveLock("x")),
        lambda: advisory("x").acquire(),
        lambda: ExclusiveLock("x").acquire(),
        lambda: ShareLock("x").acquire(blocking=False),
        advisory("x")(lambda: pytest.fail("the body ran")),
    ],
)
def test_an_interruption_at_the_moment_of_taking_leaves_nothing_behind(rival, take):
    def interrupts(frame, event, _):
        if event == "return" and frame.f_code is Claim.take.__code__:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(interrupts)
    try:
        with pytest.raises(KeyboardInterrupt):
            take()
    finally:
        sys.setprofile(None)
    assert rival.could_take("x")
    with pytest.raises(LockNotHeld):
        advisory("x").release()


def test_a_decorator_without_parentheses_is_refused():
    with pytest.raises(LockMisuse, match=r"@advisory\(\)"):

        @advisory
        def bare():
            pass


@pytest.mark.parametrize("using", [None, 1])
def test_what_is_no_alias_is_refused(using):
    with pytest.raises(LockMisuse, match="DATABASES"):
        advisory("x", using=using)


@pytest.mark.parametrize("xact", [False, True])
def test_a_misspelt_alias_is_refused_with_a_guess(transactional_db, xact):
    with pytest.raises(LockMisuse, match="Did you mean 'default'"):
        advisory("x", using="defualt", xact=xact).__enter__()


class TestTransactionLevel:
    @pytest.mark.parametrize("shared", [(False, False), (False, True), (True, False)])
    def test_one_that_would_wait_for_the_session_level_one_around_it_is_refused(self, rival, shared):
        outer, inner = shared
        with advisory("mine", shared=outer), pytest.raises(LockMisuse, match="wait for itself"):
            advisory("mine", shared=inner, xact=True).__enter__()
        assert rival.could_take("mine")

    def test_one_that_shares_with_the_session_level_one_around_it_is_taken(self, rival):
        with advisory("mine", shared=True), advisory("mine", shared=True, xact=True) as acquired:
            assert acquired
        with advisory("mine"), advisory("another", xact=True) as acquired:
            assert acquired

    def test_it_is_freed_by_the_commit(self, rival):
        with advisory("books", xact=True):
            assert connection.in_atomic_block
            assert not rival.could_take("books")
        assert rival.could_take("books")

    def test_a_failing_body_rolls_back(self, rival):
        with pytest.raises(ValueError, match="body"), advisory("books", xact=True):
            connection.cursor().execute("CREATE TABLE rolled_back ()")
            raise ValueError("body")
        assert rival.ask("SELECT to_regclass('rolled_back')") is None
        assert rival.could_take("books")

    def test_inside_a_transaction_it_is_refused(self, transactional_db):
        with transaction.atomic(), pytest.raises(RuntimeError, match="is open already"):
            advisory("books", xact=True).__enter__()

    def test_a_transaction_that_cannot_begin_tells_its_own_reason(self, rival, monkeypatch):
        def refuse():
            raise RuntimeError("as asked")

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="as asked"):
            patched.setattr(connection, "get_autocommit", refuse)
            advisory("books", xact=True).__enter__()

    def test_closing_its_connection_loses_it(self, rival):
        with pytest.raises(LockLost), advisory("books", xact=True):
            connection.close()
            wait_until(lambda: rival.could_take("books"), "the server has read of it")

    def test_a_decorator_opens_a_transaction(self, rival):
        @advisory("books", xact=True)
        def close():
            return connection.in_atomic_block, rival.could_take("books")

        assert close() == (True, False)
        assert rival.could_take("books")

    def test_acquire_keeps_it_until_the_transaction_ends(self, rival):
        with transaction.atomic():
            assert advisory("books", xact=True).acquire()
            assert not rival.could_take("books")
        assert rival.could_take("books")

    @pytest.mark.parametrize("timeout", [0, 0.1])
    def test_a_refusal_leaves_the_transaction_usable_and_gives_back_gains(self, rival, timeout):
        lock = advisory("a", "b", xact=True, timeout=timeout)
        rival.take(lock.keys[1])
        with transaction.atomic():
            assert not lock.acquire()
            assert rival.could_take(lock.keys[0])
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")

    @pytest.mark.parametrize("timeout", [0, 1, None])
    def test_the_transactions_own_lock_timeout_is_put_back(self, rival, timeout):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET LOCAL lock_timeout = '7s'")
            assert advisory("a", "b", xact=True, timeout=timeout).acquire()
            cursor.execute("SHOW lock_timeout")
            assert cursor.fetchone() == ("7s",)


class TestAsking:
    def test_a_free_lock_would_run(self, rival):
        explanation = advisory("free").explain()
        assert explanation.would_run
        assert not explanation.holders
        assert not advisory("free").is_held()
        assert str(explanation) == "lock 'free': free to take"

    def test_a_holder_is_told_with_pid_and_time(self, rival):
        with advisory("asked"):
            explanation = in_another_thread(advisory("asked").explain)
            (holder,) = explanation.holders
            assert not explanation.would_run
            assert holder.pid == rival.ask(f"SELECT pid FROM pg_locks WHERE {ADVISORY_HERE}")
            assert abs(holder.since.timestamp() - time.time()) < 5
            assert "held by a session that is no task" in str(explanation)
        assert not advisory("asked").is_held()

    def test_asking_does_not_wipe_the_holders_own_label(self, rival):
        with advisory("asked"):
            advisory("asked").explain()
            assert in_another_thread(advisory("asked").holders)[0].since

    def test_waiters_are_told_and_hold_off_shared_ones(self, rival):
        with advisory("asked", shared=True):

            def wait():
                with advisory("asked", timeout=20):
                    pass

            waiting = threading.Thread(target=wait)
            assert advisory("asked", shared=True).explain().would_run
            waiting.start()
            wait_until(lambda: advisory("asked").explain().waiters)
            explanation = advisory("asked", shared=True).explain()
            assert not explanation.would_run
            assert "waited for by" in str(explanation)
        waiting.join()

    def test_with_a_limit_it_would_run_while_a_slot_is_free(self, rival):
        lock = advisory("asked", limit=2)
        with lock:
            assert lock.explain().would_run
            rival.take(key("asked").slots(2)[1])
            assert not lock.explain().would_run
            assert len(lock.holders()) == 2


class TestLosing:
    def terminate(self, rival):
        rival.ask(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE {ADVISORY_HERE}")

    def test_a_lock_that_is_gone_is_told_on_leaving(self, rival):
        with pytest.raises(LockLost, match="'gone'"), advisory("gone"):
            self.terminate(rival)
        with advisory("gone") as acquired:
            assert acquired

    def test_an_unlock_that_postgresql_denies_is_told(self, rival):
        with pytest.raises(LockLost), advisory("gone"):
            pool().leased["default"].rows("SELECT pg_advisory_unlock_all()::text", [])

    def test_the_bodys_own_error_is_not_hidden(self, rival, caplog):
        with pytest.raises(ValueError, match="body"), advisory("gone"):
            self.terminate(rival)
            raise ValueError("body")
        assert "lock 'gone' was lost before its body failed" in caplog.text

    def test_a_look_that_fails_loses_nothing(self, rival):
        with advisory("kept"):
            with pytest.raises(DataError):
                pool().leased["default"].rows("SELECT 1 / 0", [])
            assert not rival.could_take("kept")

    def test_nothing_is_taken_on_top_of_a_lost_lock(self, rival):
        with pytest.raises(LockLost), advisory("gone"):
            self.terminate(rival)
            with pytest.raises(LockLost), advisory("more"):
                pytest.fail("it must not run")


def test_a_disabled_lock_takes_nothing(rival, pglock_settings):
    pglock_settings(ENABLED=False)
    rival.take("taken")
    with advisory("taken", timeout=0) as acquired, advisory("other", xact=True):
        assert acquired
        assert connection.in_atomic_block
        assert rival.sees_advisory_locks() == 1
