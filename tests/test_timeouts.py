"""timeout(): how long statements wait for locks, and what is in force afterwards."""

import asyncio
import threading
import time
from datetime import timedelta

import psycopg
import pytest
from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError, connection, connections, transaction

from celery_pglock import ExclusiveLock, LockMisuse, LockNotAcquired, advisory, timeout, timeouts
from celery_pglock.timeouts import in_force
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "locks"])


def ask(sql, using="default"):
    with connections[using].cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone()[0] if cursor.description else None


def shown(using="default"):
    return ask("SHOW lock_timeout", using)


def source():
    return ask("SELECT source FROM pg_settings WHERE name = 'lock_timeout'")


@pytest.fixture(autouse=True)
def _connections_of_its_own():
    yield
    connections.close_all()


@pytest.fixture
def table(rival):
    """A table that the rival has locked."""
    rival.connection.execute("CREATE TABLE contested ()")
    rival.connection.autocommit = False
    rival.connection.execute("LOCK TABLE contested")
    yield "contested"
    rival.connection.rollback()
    rival.connection.execute("DROP TABLE contested")
    rival.connection.commit()


@pytest.mark.parametrize(
    ("block", "in_force_as"),
    [
        (lambda: timeout(1), "1s"),
        (lambda: timeout(0.25), "250ms"),
        (lambda: timeout(2.007), "2007ms"),
        (lambda: timeout(milliseconds=9), "9ms"),
        (lambda: timeout(timedelta(minutes=2)), "2min"),
        (lambda: timeout(seconds=1, milliseconds=500), "1500ms"),
        (lambda: timeout(hours=1, using="default"), "1h"),
        (lambda: timeout(0), "1ms"),
        (lambda: timeout(microseconds=1), "1ms"),
        (lambda: timeout(None), "0"),
        (lambda: timeout(timeout=3), "3s"),
        (lambda: timeout(float("inf")), "2147483647ms"),
    ],
)
def test_it_is_in_force_in_the_block_alone(block, in_force_as):
    before = shown(), source()
    with block() as given:
        assert given is None
        assert shown() == in_force_as
    assert (shown(), source()) == before


def test_as_a_decorator_it_is_in_force_in_each_call():
    @timeout(2)
    def look(more):
        """Look."""
        return shown(), more

    assert (look.__name__, look.__doc__) == ("look", "Look.")
    assert shown() == "0"
    assert look("more") == look(more="more") == ("2s", "more")
    assert shown() == "0"


def test_a_statement_that_waits_longer_fails(table):
    started = time.monotonic()
    with pytest.raises(OperationalError) as refused, timeout(0.2):
        ask(f"SELECT count(*) FROM {table}")
    assert isinstance(refused.value.__cause__, psycopg.errors.LockNotAvailable)
    assert 0.2 <= time.monotonic() - started < 5
    assert shown() == "0"


def test_what_a_session_had_set_is_put_back():
    ask("SET lock_timeout = '30s'")
    with timeout(1):
        assert shown() == "1s"
    assert (shown(), source()) == ("30s", "session")
    ask("RESET lock_timeout")
    assert shown() == "0"


def test_what_a_database_or_a_role_has_set_comes_from_there_again(rival):
    database = connection.settings_dict["NAME"]
    rival.connection.execute(f'ALTER DATABASE "{database}" SET lock_timeout = 7000')
    try:
        connection.close()
        with timeout(1):
            assert shown() == "1s"
        assert (shown(), source()) == ("7s", "database")
    finally:
        rival.connection.execute(f'ALTER DATABASE "{database}" RESET lock_timeout')


def test_what_the_options_of_the_alias_set_comes_from_there_again(monkeypatch):
    connection.close()
    options = {**connection.settings_dict["OPTIONS"], "options": "-c lock_timeout=9000"}
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    with timeout(1), timeout(2):
        assert shown() == "2s"
    assert (shown(), source()) == ("9s", "client")


def test_blocks_nest_in_others_and_in_themselves():
    block = timeout(1)
    with block:
        with timeout(2), block:
            assert shown() == "1s"
            with timeout(None):
                assert shown() == "0"
                assert in_force("default") is None
            assert shown() == "1s"
        assert shown() == "1s"
        with timeout(5), transaction.atomic(), timeout(6):
            assert shown() == "6s"
        assert shown() == "1s"
    assert (shown(), source()) == ("0", "default")


def test_one_value_serves_many_threads():
    block = timeout(3)
    both_inside = threading.Barrier(2, timeout=20)
    seen = []

    def enter():
        with block:
            both_inside.wait()
            seen.append(shown())
            both_inside.wait()
        seen.append(shown())
        connection.close()

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["3s", "3s", "0", "0"]


def test_aliases_are_apart():
    with timeout(1), timeout(2, using="locks"):
        assert (shown(), shown("locks")) == ("1s", "2s")
        assert (in_force("default"), in_force("locks")) == (1, 2)
    assert (shown(), shown("locks")) == ("0", "0")


class TestInATransaction:
    def test_a_local_setting_is_put_back(self):
        with transaction.atomic():
            ask("SET LOCAL lock_timeout = '7s'")
            with timeout(1):
                assert shown() == "1s"
            assert shown() == "7s"
        assert shown() == "0"

    def test_a_sessions_setting_is_in_force_after_the_commit_too(self):
        ask("SET lock_timeout = '20s'")
        with transaction.atomic():
            with timeout(1):
                assert shown() == "1s"
            assert shown() == "20s"
        assert (shown(), source()) == ("20s", "session")

    def test_nothing_of_it_is_left_after_the_end(self):
        with transaction.atomic(), timeout(1):
            pass
        assert (shown(), source()) == ("0", "default")

    def test_a_transaction_begun_by_hand_is_one(self):
        ask("SET lock_timeout = '20s'")
        ask("BEGIN")
        ask("SET LOCAL lock_timeout = '7s'")
        with timeout(1):
            assert shown() == "1s"
        assert shown() == "7s"
        ask("COMMIT")
        assert shown() == "20s"

    def test_an_error_in_a_savepoint_leaves_the_outer_setting(self, table):
        with transaction.atomic():
            with pytest.raises(OperationalError), transaction.atomic(), timeout(0.1):
                ask(f"SELECT count(*) FROM {table}")
            assert shown() == "0"
            with timeout(5):
                with pytest.raises(OperationalError), transaction.atomic(), timeout(0.1):
                    ask(f"SELECT count(*) FROM {table}")
                assert shown() == "5s"
            assert shown() == "0"

    def test_an_aborted_transaction_is_put_right_by_its_rollback(self, table, caplog):
        ask("SET lock_timeout = '20s'")
        with pytest.raises(OperationalError), transaction.atomic(), timeout(0.1):
            ask(f"SELECT count(*) FROM {table}")
        assert (shown(), source()) == ("20s", "session")
        assert not caplog.records

    def test_a_body_that_calls_for_a_rollback_is_left_quietly(self):
        with transaction.atomic(), timeout(1):
            transaction.set_rollback(True)
        assert shown() == "0"

    def test_without_autocommit_it_ends_with_the_transaction(self):
        connection.set_autocommit(False)
        try:
            with timeout(1):
                assert shown() == "1s"
                transaction.rollback()
            assert connection.connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
            with timeout(1):
                transaction.commit()
                ask("SET LOCAL lock_timeout = '4s'")
            assert shown() == "4s"
            transaction.rollback()
            assert shown() == "0"
        finally:
            transaction.rollback()
            connection.set_autocommit(True)


class TestConnectionsThatGo:
    def test_one_that_was_closed_is_left_alone(self, caplog):
        with timeout(1):
            connection.close()
        with timeout(1):
            connection.close()
            ask("SET lock_timeout = '8s'")
        assert shown() == "8s"
        assert not caplog.records

    def test_one_that_went_back_to_its_pool_is_nobody_elses_business(self, monkeypatch):
        connection.close()
        options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
        monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
        monkeypatch.setitem(connection.settings_dict, "CONN_MAX_AGE", 0)
        try:
            with timeout(1):
                assert shown() == "1s"
            assert shown() == "0"
            with timeout(1):
                pooled = connection.connection
                connection.close()
                monkeypatch.setattr(pooled, "execute", lambda *_: pytest.fail("it may be in use"))
            assert not pooled.closed
        finally:
            connection.close()
            connection.close_pool()

    def test_one_that_the_server_ended_is_left_quietly(self, rival, caplog):
        with timeout(1):
            rival.ask("SELECT pg_terminate_backend(%s, 5000)", ask("SELECT pg_backend_pid()"))
        with pytest.raises(ValueError, match="body"):
            connection.close()
            with timeout(1):
                rival.ask("SELECT pg_terminate_backend(%s, 5000)", ask("SELECT pg_backend_pid()"))
                raise ValueError("body")
        assert not caplog.records

    def test_what_cannot_be_put_back_is_told_but_hides_no_error(self, caplog):
        def busy():
            connection.connection.pgconn.send_query(b"SELECT 1")

        with pytest.raises(OperationalError, match="another command"), timeout(1):
            busy()
        assert not caplog.records
        connection.close()
        with pytest.raises(ValueError, match="body"), timeout(1):
            busy()
            raise ValueError("body")
        assert "could not be put back" in caplog.text


def test_an_interruption_while_entering_leaves_nothing_set(monkeypatch):
    class Interrupted(BaseException):
        pass

    ask("SET lock_timeout = '6s'")
    raw = connection.connection
    execute = raw.execute

    def execute_and_be_interrupted(*arguments):
        execute(*arguments)
        raise Interrupted

    monkeypatch.setattr(raw, "execute", execute_and_be_interrupted)
    with pytest.raises(Interrupted), timeout(1):
        pytest.fail("it must not run")
    assert raw.closed
    assert shown() == "0"
    assert repr(in_force("default")) == "<unset>"


@pytest.mark.parametrize("asking", [True, False])
def test_an_interruption_while_leaving_leaves_nothing_set(monkeypatch, asking):
    class Interrupted(Exception):
        pass

    def interrupted(*_):
        monkeypatch.undo()
        raise Interrupted

    ask("SET lock_timeout = '6s'")
    with pytest.raises(Interrupted), timeout(1):
        if asking:
            monkeypatch.setattr(connection.connection, "execute", interrupted)
        else:
            monkeypatch.setattr(timeouts, "_closed_if_in_doubt", interrupted)
    assert shown() == ("0" if asking else "6s")


def test_an_interruption_in_the_last_moment_of_entering_leaves_nothing_set():
    class Interrupted(Exception):
        pass

    class Interrupting(timeout):
        def fresh(self):
            entered = super().fresh()
            enter = entered.__enter__

            class Entering:
                def __enter__(self):
                    enter()
                    raise Interrupted

                __exit__ = staticmethod(entered.__exit__)

            return Entering()

    with pytest.raises(Interrupted), Interrupting(1):
        pytest.fail("it must not run")
    assert shown() == "0"
    assert repr(in_force("default")) == "<unset>"


class TestLocksThatWaitElsewhere:
    def test_it_bounds_the_wait_of_a_session_level_lock(self, rival):
        rival.take("taken")
        started = time.monotonic()
        with timeout(0.2):
            assert not advisory("taken").acquire()
            assert not advisory("taken", "more").acquire()
            with advisory("other"):
                assert not advisory("taken").acquire()
            with pytest.raises(LockNotAcquired, match="lock_timeout ran out"):
                ExclusiveLock("taken").acquire()
        assert 0.8 <= time.monotonic() - started < 10

    def test_it_bounds_the_wait_for_a_slot(self, rival):
        for slot in advisory("taken").keys[0].slots(2):
            rival.take(slot)
        with timeout(0.2):
            assert not advisory("taken", limit=2).acquire()

    def test_it_bounds_a_transaction_level_lock(self, rival):
        rival.take("taken")
        with timeout(0.2), transaction.atomic():
            assert not advisory("taken", xact=True).acquire()

    def test_zero_does_not_wait(self, rival):
        rival.take("taken")
        with timeout(0):
            assert not advisory("taken").acquire()

    def test_a_timeout_of_its_own_counts_more(self, rival):
        rival.take("taken")
        with timeout(20):
            assert not advisory("taken", timeout=0.1).acquire()

    def test_for_ever_is_for_ever(self, rival):
        rival.take("taken")

        def step_aside():
            wait_until(lambda: rival.sees_held("taken", granted=False))
            rival.give_back("taken")

        stepping_aside = threading.Thread(target=step_aside)
        stepping_aside.start()
        with timeout(0.05), timeout(None), advisory("taken") as acquired:
            assert acquired
        stepping_aside.join()

    def test_one_on_another_alias_or_thread_does_not_count(self, rival):
        rival.take("taken")
        with timeout(20), timeout(0, using="locks"):
            assert in_force("default") == 20
            seen = []
            thread = threading.Thread(target=lambda: seen.append(repr(in_force("default"))))
            thread.start()
            thread.join()
        assert seen == ["<unset>"]


async def coroutine():
    pass


def generator():
    yield


class Called:
    async def __call__(self):
        pass


@pytest.mark.parametrize("function", [coroutine, generator, Called()])
def test_what_runs_after_its_call_is_refused(function):
    with pytest.raises(LockMisuse, match="before its body runs"):
        timeout(1)(function)


@pytest.mark.parametrize(
    ("misuse", "cure"),
    [
        (lambda: timeout(), "takes either a number"),
        (lambda: timeout(1, seconds=1), "takes either a number"),
        (lambda: timeout(None, seconds=1), "takes either a number"),
        (lambda: timeout(-1), "None to wait for ever"),
        (lambda: timeout(float("nan")), "0 or more seconds"),
        (lambda: timeout(True), "must be a number of seconds"),
        (lambda: timeout("1"), "must be a number of seconds"),
        (lambda: timeout(timedelta(seconds=-1)), "0 or more seconds"),
        (lambda: timeout(second=1), "'second'. Did you mean 'seconds'?"),
        (lambda: timeout(1, usimg="default"), "Did you mean 'using'?"),
        (lambda: timeout(seconds="1"), r"timeout\(seconds=...\) must be a number"),
        (lambda: timeout(seconds=True), r"timeout\(seconds=...\) must be a number"),
        (lambda: timeout(seconds=-1), "0 or more seconds"),
        (lambda: timeout(seconds=float("nan")), "0 or more seconds"),
        (lambda: timeout(1, using="sqlite").__enter__(), "not PostgreSQL but sqlite"),
        (lambda: timeout(1, using="defaults").__enter__(), "Did you mean 'default'?"),
        (lambda: timeout(1)(int), "decorates functions"),
    ],
)
def test_misuse_is_refused_with_the_cure(misuse, cure):
    with pytest.raises(LockMisuse, match=cure.replace("?", r"\?")):
        misuse()


def test_coroutines_which_share_a_thread_cannot_use_it():
    async def enter():
        with timeout(1):
            pass

    with pytest.raises(SynchronousOnlyOperation):
        asyncio.run(enter())


def test_it_is_a_value():
    assert timeout(1) == timeout(timedelta(seconds=1)) == timeout(seconds=1)
    assert timeout(1) != timeout(1, using="locks")
    assert repr(timeout(1)) == "timeout(seconds=1.0, using='default')"
    with pytest.raises(AttributeError):
        timeout(1).seconds = 2
