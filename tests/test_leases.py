"""A lock session is heard while it holds something, and costs nothing while it does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import psycopg
import pytest
from django.db import OperationalError, ProgrammingError, connections

from celery_pglock import LockLost, advisory, clocks, lifelines, polls
from celery_pglock.claims import LOCK_DELAY
from celery_pglock.lifelines import BEAT, GIVE_UP
from celery_pglock.pool import pool
from celery_pglock.sessions import LockSession
from tests.conftest import ADVISORY_HERE, wait_until
from tests.faults.proxy import Proxy
from tests.test_sessions import statements_logged_by_the_server

LEASE = 1.0

QUERY = f"SELECT query FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE {ADVISORY_HERE} AND granted"


@pytest.fixture(autouse=True)
def _lease_of_a_second(pglock_settings):
    pglock_settings(LEASE=LEASE)


@contextmanager
def after(seconds, function, *arguments):
    """Call it meanwhile, and have done so when the block is left: what it uses may be closed then."""
    timer = threading.Timer(seconds, function, arguments)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def watchers():
    return [thread for thread in threading.enumerate() if thread.name == "celery_pglock-watcher"]


def session():
    return pool().leased["default"]


def test_the_server_would_end_a_silent_session(rival):
    with advisory("k"):
        assert session().rows("SELECT current_setting('idle_session_timeout')", []) == [("1s",)]


def test_a_lock_is_kept_for_many_leases_and_its_label_with_it(rival):
    with advisory("k"):
        time.sleep(2.5 * LEASE)
        assert not rival.could_take("k")
        assert rival.ask(QUERY).startswith("/*pglock:1 task= id= worker= key=1:")
        assert rival.ask(QUERY).endswith(":k*/ SELECT pg_backend_pid()")


def test_a_lock_that_was_waited_for_longer_than_a_lease_is_believed_in(rival):
    rival.take("k")
    with after(1.5 * LEASE, rival.give_back, "k"):
        hold = advisory("k").take()
    hold.check()
    assert hold.give_back()


@pytest.mark.parametrize("timeout", [None, 60])
def test_outer_locks_are_kept_while_an_inner_one_is_waited_for(rival, timeout):
    rival.take("inner")
    with after(2 * LEASE, rival.give_back, "inner"), advisory("outer"):
        with advisory("inner", timeout=timeout) as acquired:
            assert acquired
            assert not rival.could_take("outer")
        assert not rival.could_take("outer")


def test_an_answer_that_was_read_already_is_not_waited_for(rival):
    with advisory("outer"):
        line = session()._line
        with line.speaking:
            # The watcher asks, the answer comes, and the owner reads it before the watcher does.
            wait_until(lambda: line._silence > BEAT * LEASE)
            line._beat(session()._beat)
            wait_until(lambda: polls.look({line.socket: polls.READABLE}))
            line.read_what_came_unasked()
            started = time.monotonic()
            with advisory("inner", timeout=0) as acquired:
                assert acquired
            assert time.monotonic() - started < 0.3 * LEASE
        assert not line.loss


def test_an_answer_of_another_backend_is_none(rival):
    hold = advisory("k").take()
    session()._line.backend_pid += 1
    wait_until(lambda: hold.loss)
    assert hold.loss == "another backend answered than the one that keeps it"
    assert not hold.give_back()


def test_an_error_before_anything_was_sent_is_no_answer(rival):
    hold = advisory("k").take()
    line = session()._line
    time.sleep(0.1)
    before = line._silence
    with pytest.raises(ProgrammingError):
        session().rows("SELECT %s", [object()])
    assert line._silence >= before
    hold.give_back()


@pytest.mark.parametrize("lease", [1, 3])
def test_whoever_is_cut_off_is_told_before_a_strict_lock_is_given_to_the_next(
    rival, proxied, pglock_settings, lease
):
    pglock_settings(LEASE=lease)
    hold = advisory("k", using="proxied").take()
    told = []
    hold.session.to_be_told.append(lambda _: told.append(time.monotonic()))
    line = hold.session._line
    wait_until(lambda: line._silence < 0.05 * lease and line._silence > 0)
    proxied.black_hole()
    cut_at = time.monotonic()
    rival.ask("SELECT pg_terminate_backend(%s)", hold.session.backend_pid)
    wait_until(lambda: told)
    assert told[0] - cut_at < (GIVE_UP + LOCK_DELAY) / 2 * lease + 0.02
    hold.give_back()


def test_a_wait_beside_other_locks_ends_in_time(rival):
    rival.take("inner")
    with advisory("outer"):
        started = time.monotonic()
        assert not advisory("inner", timeout=0.5).acquire()
        assert 0.5 <= time.monotonic() - started < 5


def test_checking_asks_nobody(rival):
    hold = advisory("k").take()

    def check_often():
        for _ in range(100):
            hold.check()

    assert statements_logged_by_the_server(session()._line.connection, check_often) == []
    hold.give_back()


class TestWatching:
    @pytest.mark.usefixtures("pooled")
    def test_one_thread_watches_all_sessions_and_ends_with_the_last(self, rival):
        release = threading.Event()

        def hold(number):
            with advisory(f"number {number}"):
                release.wait(10)

        threads = [threading.Thread(target=hold, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: rival.sees_advisory_locks() == 4)
        assert len(watchers()) == 1
        release.set()
        for thread in threads:
            thread.join()
        wait_until(lambda: not watchers(), "idle sessions are closed, and the watcher ends")

    @pytest.mark.usefixtures("pooled")
    def test_an_idle_session_is_not_heard(self, rival):
        with advisory("k"):
            pass
        last = (
            "SELECT max(query_start) FROM pg_stat_activity WHERE application_name = 'pglock'"
            " AND datname = current_database()"
        )
        before = rival.ask(last)
        time.sleep(LEASE / 3)
        assert rival.ask(last) == before

    def test_the_session_of_a_thread_that_ended_is_not_kept_alive(self, rival):
        thread = threading.Thread(target=advisory("k").acquire)
        thread.start()
        thread.join()
        wait_until(lambda: rival.could_take("k"), "its session has ended")

    def test_a_fork_does_not_keep_the_session_of_a_parent_that_is_killed(self, rival):
        code = """
import django, os, time
django.setup()
from celery_pglock import advisory
advisory("k").acquire()
if not os.fork():
    time.sleep(60)
time.sleep(60)
"""
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "TEST_DATABASE_NAME": connections["default"].settings_dict["NAME"],
        }
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
        try:
            wait_until(lambda: rival.sees_held("k"))
            # Until the fork is done.
            time.sleep(0.2)
            process.kill()
            wait_until(lambda: rival.could_take("k"), seconds=1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def test_an_answer_may_come_while_the_watcher_looks_at_the_clock(self, rival, monkeypatch):
        with advisory("k"):
            line = session()._line
            line._answer_by = lifelines.now() + LEASE

            def now():
                line._answer_by = None
                return clocks.now()

            monkeypatch.setattr(lifelines, "now", now)
            line.listen(None)
            assert not line.loss

    def test_a_session_may_be_taken_up_while_the_watcher_looks_at_it(self, rival, pooled):
        with advisory("k"):
            its = session()
        looks = iter([its._idle_since])

        class TakenUp(LockSession):
            _idle_since = property(lambda _: next(looks, None))

        its.__class__ = TakenUp
        assert its.tend() > 0
        assert next(looks, "looked at") == "looked at"
        its.__class__ = LockSession

    def test_a_session_that_cannot_be_watched_is_given_up(self, rival, monkeypatch, caplog):
        def fail(_):
            raise ZeroDivisionError("as asked")

        hold = advisory("k").take()
        monkeypatch.setattr("celery_pglock.sessions.LockSession.tend", fail)
        wait_until(lambda: hold.loss, "it is given up")
        assert hold.loss == "watching it failed: as asked"
        monkeypatch.undo()
        assert not hold.give_back()
        assert "Watching a lock session failed" in caplog.text


@pytest.fixture
def proxied(rival, django_db_blocker):
    """An alias that leads to the server through a proxy that can be told to fail, and the proxy."""
    server = connections.databases["default"]
    with Proxy(int(server["PORT"])) as proxy, django_db_blocker.unblock():
        connections.databases["proxied"] = {**server, "PORT": str(proxy.port)}
        yield proxy
        connections["proxied"].close()
        del connections["proxied"]
        del connections.databases["proxied"]


class TestBlackHole:
    """Everything is taken and acknowledged, and nothing arrives: what no timeout of TCP notices."""

    def test_a_holder_gives_up_before_the_server_frees_the_key(self, rival, proxied):
        for number in range(5):
            key = f"number {number}"
            hold = advisory(key, using="proxied").take()
            proxied.black_hole()
            started = time.monotonic()
            wait_until(lambda: hold.loss, "it gives up")  # noqa: B023
            gave_up = time.monotonic() - started
            assert not rival.could_take(key)
            wait_until(lambda: rival.could_take(key))  # noqa: B023
            freed = time.monotonic() - started
            assert gave_up < freed <= LEASE + 0.5
            assert "the server has not been heard" in hold.loss
            with pytest.raises(LockLost):
                hold.leave(None)
            proxied.heal(deliver=False)

    def test_opening_a_session_does_not_hang(self, rival, proxied, monkeypatch):
        monkeypatch.setattr("celery_pglock.raw_connections.CONNECT_SECONDS", 1)
        connect = psycopg.connect

        def connect_into_the_dark(**parameters):
            connection = connect(**parameters)
            proxied.black_hole()
            return connection

        started = time.monotonic()
        with monkeypatch.context() as patch, pytest.raises(OperationalError):
            patch.setattr("psycopg.connect", connect_into_the_dark)
            advisory("k", using="proxied", timeout=0).acquire()
        assert time.monotonic() - started < 10

    def test_taking_a_lock_does_not_hang(self, rival, proxied, pooled):
        advisory("warm up", using="proxied").take().give_back()
        proxied.black_hole()
        with pytest.raises(OperationalError):
            advisory("k", using="proxied", timeout=0).acquire()

    def test_waiting_for_a_lock_does_not_hang(self, rival, proxied, pooled):
        advisory("warm up", using="proxied").take().give_back()
        rival.take("k")
        with after(0.1, proxied.black_hole), pytest.raises(OperationalError):
            advisory("k", using="proxied", timeout=0.5).acquire()

    def test_a_wait_beside_other_locks_ends_when_they_are_lost(self, rival, proxied):
        rival.take("inner")
        with pytest.raises(LockLost, match="'outer'"), advisory("outer", using="proxied"):
            with after(0.2, proxied.black_hole), pytest.raises(OperationalError):
                advisory("inner", using="proxied").acquire()
            assert not rival.could_take("outer")
        proxied.heal(deliver=False)

    def test_giving_back_does_not_hang(self, rival, proxied):
        hold = advisory("k", using="proxied").take()
        proxied.black_hole()
        assert not hold.give_back()

    def test_a_key_that_was_lost_through_it_can_be_taken_again(self, rival, proxied):
        hold = advisory("k", using="proxied").take()
        proxied.black_hole()
        wait_until(lambda: hold.loss)
        hold.give_back()
        proxied.heal()
        with advisory("k", using="proxied") as acquired:
            assert acquired


def test_a_connection_that_is_cut_is_noticed_at_once(rival, proxied):
    hold = advisory("k", using="proxied").take()
    proxied.cut()
    wait_until(lambda: hold.loss, seconds=BEAT * LEASE)
    wait_until(lambda: rival.could_take("k"))
    hold.give_back()
