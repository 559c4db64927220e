"""A lock session is heard while it holds something, and costs nothing while it does not."""

import threading
import time

import pytest
from django.db import OperationalError, connections

from celery_pglock import LockLost, advisory
from celery_pglock.lifelines import BEAT
from celery_pglock.pool import pool
from tests.conftest import wait_until
from tests.faults.proxy import Proxy
from tests.test_sessions import statements_logged_by_the_server

LEASE = 1.0

QUERY = "SELECT query FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND granted"


@pytest.fixture(autouse=True)
def _lease_of_a_second(pglock_settings):
    pglock_settings(LEASE=LEASE)


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
        assert rival.ask(QUERY).endswith(":k*/ SELECT 1")


def test_a_lock_that_was_waited_for_longer_than_a_lease_is_believed_in(rival):
    rival.take("k")
    threading.Timer(1.5 * LEASE, rival.give_back, ["k"]).start()
    hold = advisory("k").take()
    hold.check()
    assert hold.give_back()


@pytest.mark.parametrize("timeout", [None, 60])
def test_outer_locks_are_kept_while_an_inner_one_is_waited_for(rival, timeout):
    rival.take("inner")
    threading.Timer(2 * LEASE, rival.give_back, ["inner"]).start()
    with advisory("outer"):
        with advisory("inner", timeout=timeout) as acquired:
            assert acquired
            assert not rival.could_take("outer")
        assert not rival.could_take("outer")


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
        last = "SELECT max(query_start) FROM pg_stat_activity WHERE application_name = 'pglock'"
        before = rival.ask(last)
        time.sleep(LEASE / 3)
        assert rival.ask(last) == before

    def test_the_session_of_a_thread_that_ended_is_not_kept_alive(self, rival):
        thread = threading.Thread(target=advisory("k").acquire)
        thread.start()
        thread.join()
        wait_until(lambda: rival.could_take("k"), "its session has ended")

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

    def test_taking_a_lock_does_not_hang(self, rival, proxied, pooled):
        advisory("warm up", using="proxied").take().give_back()
        proxied.black_hole()
        with pytest.raises(OperationalError):
            advisory("k", using="proxied", timeout=0).acquire()

    def test_waiting_for_a_lock_does_not_hang(self, rival, proxied, pooled):
        advisory("warm up", using="proxied").take().give_back()
        rival.take("k")
        threading.Timer(0.1, proxied.black_hole).start()
        with pytest.raises(OperationalError):
            advisory("k", using="proxied", timeout=0.5).acquire()

    def test_a_wait_beside_other_locks_ends_when_they_are_lost(self, rival, proxied):
        rival.take("inner")
        with pytest.raises(LockLost, match="'outer'"), advisory("outer", using="proxied"):
            threading.Timer(0.2, proxied.black_hole).start()
            with pytest.raises(OperationalError):
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
