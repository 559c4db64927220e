"""Code that gets through: what blocks it is stopped, and nothing else."""

import logging
import signal
import threading
from datetime import timedelta

import psycopg
import pytest
from django.apps import apps
from django.db import OperationalError, connection, transaction
from django.test.utils import modify_settings

from celery_pglock import (
    Cancel,
    LockMisuse,
    LockNotAcquired,
    PrioritizeSideEffect,
    Raise,
    Terminate,
    advisory,
    prioritize,
)
from celery_pglock.pool import pool
from tests.conftest import Rival, wait_until
from tests.models import Entry

SOON = 0.1


@pytest.fixture
def other_rival(transactional_db):
    somebody = Rival()
    yield somebody
    somebody.connection.close()


def holds_the_table(rival, application_name="somebody"):
    rival.connection.execute("SELECT set_config('application_name', %s, false)", [application_name])
    rival.connection.execute("BEGIN")
    rival.connection.execute("LOCK TABLE tests_entry IN ACCESS EXCLUSIVE MODE")


def holds_a_row(rival):
    Entry.objects.create(key="row", task_id="", what="begins")
    rival.connection.execute("BEGIN")
    rival.connection.execute("SELECT FROM tests_entry FOR UPDATE")


def is_connected(rival):
    try:
        rival.connection.execute("SELECT 1")
    except psycopg.errors.InFailedSqlTransaction:
        return True
    except psycopg.OperationalError:
        return False
    return True


def looking_threads():
    return [thread for thread in threading.enumerate() if thread.name == "pglock-prioritize"]


def test_whoever_holds_a_table_is_terminated(rival):
    holds_the_table(rival)
    with prioritize(interval=SOON):
        assert Entry.objects.count() == 0
    assert not is_connected(rival)


def test_whoever_holds_a_row_is_terminated(rival):
    holds_a_row(rival)
    with prioritize(interval=SOON):
        assert Entry.objects.update(what="ends") == 1
    assert not is_connected(rival)


def test_the_lock_session_of_the_code_gets_through_too(rival):
    rival.take("taken")
    with prioritize(interval=timedelta(milliseconds=100)), advisory("taken") as acquired:
        assert acquired
    assert not is_connected(rival)


def test_each_of_several_in_the_way_is_terminated(rival, other_rival):
    rival.take("taken", shared=True)
    other_rival.take("taken", shared=True)
    with prioritize(interval=SOON), advisory("taken") as acquired:
        assert acquired
    assert not is_connected(rival)
    assert not is_connected(other_rival)


def test_a_decorated_function_gets_through_whenever_it_is_called(rival, other_rival):
    @prioritize(interval=SOON)
    def count():
        return Entry.objects.count()

    for somebody in (rival, other_rival):
        holds_the_table(somebody)
        assert count() == 0
        assert not is_connected(somebody)


def test_nobody_is_stopped_before_the_interval_is_over(rival):
    holds_the_table(rival)
    with prioritize(interval=60), pytest.raises(OperationalError), connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '300ms'; SELECT count(*) FROM tests_entry")
    assert is_connected(rival)


def test_once_means_once(rival, other_rival):
    rival.take("first")
    other_rival.take("second")
    with prioritize(interval=SOON, periodic=False):
        with advisory("first") as acquired:
            assert acquired
        assert not advisory("second", timeout=1).acquire()
    assert is_connected(other_rival)


def test_the_timeout_bounds_the_code(rival):
    holds_the_table(rival)
    with pytest.raises(OperationalError, match="lock timeout"), prioritize(interval=60, timeout=0.2):
        Entry.objects.count()
    with connection.cursor() as cursor:
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("0",)


def test_cancelling_ends_the_statement_and_leaves_the_session(rival):
    holds_the_table(rival)

    def sleep():
        with pytest.raises(psycopg.errors.QueryCanceled):
            rival.connection.execute("SELECT pg_sleep(30)")

    sleeping = threading.Thread(target=sleep)
    sleeping.start()
    with prioritize(interval=SOON, side_effect=Cancel):
        assert Entry.objects.count() == 0
    sleeping.join()
    assert is_connected(rival)


def test_cancelling_cannot_free_what_an_idle_session_holds(rival, caplog):
    holds_the_table(rival)
    caplog.set_level(logging.INFO, "celery_pglock")
    with pytest.raises(OperationalError), prioritize(interval=SOON, timeout=1, side_effect=Cancel()):
        Entry.objects.count()
    assert is_connected(rival)
    assert caplog.text.count("only terminating it frees what it holds") == 1
    assert "prioritize() is blocked by" in caplog.text
    assert "cleared" not in caplog.text


def test_filters_spare_whom_they_do_not_choose(rival):
    holds_the_table(rival, "payroll")
    spare = Terminate(blocking_activity__application_name="reports")
    with pytest.raises(OperationalError), prioritize(interval=SOON, timeout=1, side_effect=spare):
        Entry.objects.count()
    assert is_connected(rival)
    with prioritize(interval=SOON, side_effect=Terminate(blocking_activity__application_name="payroll")):
        assert Entry.objects.count() == 0


def test_a_wait_is_tolerated_as_long_as_the_filter_says(rival):
    holds_the_table(rival)
    patient = Terminate(wait_duration__gte="60 seconds")
    with pytest.raises(OperationalError), prioritize(interval=SOON, timeout=1, side_effect=patient):
        Entry.objects.count()
    assert is_connected(rival)


@pytest.mark.parametrize(
    "filters", [{"nonsense": 1}, {"wait_duration__gt": "soon"}, {"granted__nonsense": 1}]
)
def test_a_filter_that_cannot_be_used_is_refused_before_the_code_runs(transactional_db, filters):
    with pytest.raises(LockMisuse, match=r"nonsense|interval"), prioritize(side_effect=Terminate(**filters)):
        raise AssertionError("the code ran")


def test_the_code_never_stops_itself(transactional_db):
    with transaction.atomic(), connection.cursor() as cursor:
        assert advisory("mine", xact=True).acquire()
        cursor.execute("SELECT pg_backend_pid()")
        pid = cursor.fetchone()
        with prioritize(interval=SOON), pytest.raises(LockNotAcquired):
            advisory("mine", timeout=1, side_effect=Raise).acquire()
        cursor.execute("SELECT pg_backend_pid()")
        assert cursor.fetchone() == pid


def test_whoever_waits_behind_the_code_is_left_alone(rival, other_rival):
    holds_the_table(rival)
    waiting = threading.Thread(target=lambda: other_rival.ask("SELECT count(*) FROM tests_entry"))
    with prioritize(interval=1):
        Entry.objects.exists()
        waiting.start()
    waiting.join()
    assert is_connected(other_rival)


def test_code_that_connects_anew_still_gets_through(rival):
    with prioritize(interval=SOON):
        connection.close()
        holds_the_table(rival)
        assert Entry.objects.count() == 0
    assert not is_connected(rival)


class Broken(PrioritizeSideEffect):
    def worker(self, blocked_locks):
        raise ZeroDivisionError("in the side effect")


def test_code_that_has_the_last_connection_of_its_pool_gets_through(rival, monkeypatch):
    connection.close()
    options = {**connection.settings_dict["OPTIONS"], "pool": {"min_size": 1, "max_size": 1}}
    # The database is flushed before other patches are undone.
    with monkeypatch.context() as patch:
        patch.setitem(connection.settings_dict, "OPTIONS", options)
        patch.setitem(connection.settings_dict, "CONN_MAX_AGE", 0)
        try:
            holds_the_table(rival)
            with prioritize(interval=SOON, timeout=5):
                assert Entry.objects.count() == 0
            assert connection.pool is not None
        finally:
            connection.close()
            connection.close_pool()


def test_an_error_of_the_side_effect_is_raised_when_the_code_is_done(rival, caplog):
    holds_the_table(rival)
    done = []
    with (
        pytest.raises(ZeroDivisionError, match="in the side effect"),
        prioritize(interval=SOON, side_effect=Broken),
    ):
        wait_for_a_lock_in_vain(rival)
        done.append(True)
    assert done
    assert "prioritize() clears the way no longer" in caplog.text


def test_the_error_of_the_code_is_not_hidden_by_that_of_the_side_effect(rival, caplog):
    holds_the_table(rival)
    with pytest.raises(KeyError, match="mine"), prioritize(interval=SOON, side_effect=Broken):
        wait_for_a_lock_in_vain(rival)
        raise KeyError("mine")
    assert "in the side effect" in caplog.text


def wait_for_a_lock_in_vain(rival):
    with pytest.raises(OperationalError), connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '1s'; SELECT count(*) FROM tests_entry")
    connection.close()


def test_a_side_effect_of_ones_own_is_handed_the_waits(rival):
    holds_the_table(rival)
    seen = []

    class Look(PrioritizeSideEffect):
        def worker(self, blocked_locks):
            seen.extend(blocked_locks.values_list("rel_name", "blocking_activity_id"))
            return blocked_locks.terminate_blocking_activity()

    with prioritize(interval=SOON, side_effect=Look):
        Entry.objects.count()
    assert seen == [("tests_entry", rival.connection.info.backend_pid)]


def test_a_look_that_fails_is_followed_by_another(rival, other_rival, caplog):
    other_rival.connection.execute("BEGIN")
    other_rival.connection.execute("ALTER VIEW celery_pglock_blockedpglock RENAME TO elsewhere")
    holds_the_table(rival)
    giving_way = threading.Thread(
        target=lambda: [
            wait_until(lambda: "could not look" in caplog.text),
            other_rival.connection.execute("ROLLBACK"),
        ]
    )
    giving_way.start()
    with prioritize(interval=SOON):
        assert Entry.objects.count() == 0
    giving_way.join()
    assert not is_connected(rival)


def test_afterwards_nobody_looks_any_more(rival):
    with prioritize(interval=SOON):
        assert looking_threads()
        pid = wait_until(
            lambda: rival.ask(
                "SELECT pid FROM pg_stat_activity WHERE query LIKE '%%celery_pglock_blockedpglock%%'"
                " AND datname = current_database() AND pid NOT IN (pg_backend_pid(), %s)",
                connection.connection.info.backend_pid,
            )
        )
    assert not looking_threads()
    wait_until(lambda: not rival.ask("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid))


def test_an_interruption_while_the_looking_begins_leaves_nobody_looking(transactional_db, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    def start_and_signal(thread):
        start(thread)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start_and_signal)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted), prioritize(interval=SOON):
            pytest.fail("it must not run")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not looking_threads()


def test_one_value_is_shared_by_threads_and_nested_in_itself(rival, other_rival):
    shared = prioritize(interval=SOON)
    holds_the_table(rival)
    counts = []

    def count():
        with shared, shared:
            counts.append(Entry.objects.count())
        connection.close()

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [0, 0, 0]
    assert not looking_threads()


def test_a_role_that_may_not_stop_others_is_told_so_once(rival, caplog, monkeypatch):
    rival.connection.execute("DROP ROLE IF EXISTS pglock_nobody")
    rival.connection.execute("CREATE ROLE pglock_nobody")
    rival.connection.execute("GRANT pg_read_all_stats TO pglock_nobody")
    rival.connection.execute("GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO pglock_nobody")
    rival.connection.execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO pglock_nobody")
    holds_the_table(rival)
    try:
        connection.close()
        monkeypatch.setitem(connection.settings_dict["OPTIONS"], "assume_role", "pglock_nobody")
        with pytest.raises(OperationalError), prioritize(interval=SOON, timeout=1):
            Entry.objects.count()
        assert is_connected(rival)
        assert caplog.text.count("not permitted") == 1
    finally:
        monkeypatch.undo()
        connection.close()
        rival.connection.execute("ROLLBACK")
        rival.connection.execute("DROP OWNED BY pglock_nobody")
        rival.connection.execute("DROP ROLE pglock_nobody")


def test_without_the_app_it_says_what_is_missing(transactional_db):
    with (
        modify_settings(INSTALLED_APPS={"remove": "celery_pglock"}),
        pytest.raises(LockMisuse, match="INSTALLED_APPS"),
        prioritize(),
    ):
        raise AssertionError("the code ran")
    assert apps.is_installed("celery_pglock")


def test_without_the_views_it_says_how_to_get_them(transactional_db):
    with connection.cursor() as cursor:
        cursor.execute("ALTER VIEW celery_pglock_blockedpglock RENAME TO elsewhere")
        try:
            with pytest.raises(LockMisuse, match="migrate celery_pglock --database=default"), prioritize():
                raise AssertionError("the code ran")
        finally:
            cursor.execute("ALTER VIEW elsewhere RENAME TO celery_pglock_blockedpglock")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"interval": 0}, "more than 0"),
        ({"interval": None}, "more than 0"),
        ({"interval": -1}, "0 or more"),
        ({"interval": "1"}, "number of seconds"),
        ({"timeout": -1}, "0 or more"),
        ({"side_effect": Raise}, "Terminate, Cancel"),
        ({"side_effect": None}, "Terminate, Cancel"),
    ],
)
def test_what_cannot_work_is_refused(arguments, words):
    with pytest.raises(LockMisuse, match=words):
        prioritize(**arguments)


@pytest.mark.parametrize("using", ["nowhere", "sqlite"])
def test_an_alias_without_such_locks_is_refused(transactional_db, using):
    with pytest.raises(LockMisuse, match=using), prioritize(using=using):
        raise AssertionError("the code ran")


def test_a_generator_and_a_coroutine_function_are_refused():
    def generator():
        yield

    async def coroutine():
        pass

    for function in (generator, coroutine):
        with pytest.raises(LockMisuse, match="before its body"):
            prioritize()(function)


def test_equal_side_effects_are_equal():
    assert Terminate(mode="EXCLUSIVE") == Terminate(mode="EXCLUSIVE") != Terminate()
    assert Terminate() != Cancel()
    assert prioritize(side_effect=Terminate) == prioritize(side_effect=Terminate())
    assert pool().leased == {}
