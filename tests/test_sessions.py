"""Lock sessions: where they come from, what they cost, and what becomes of them."""

import gc
import itertools
import os
import random
import signal
import tempfile
import threading
import time
from contextlib import ExitStack

import pytest
from django.db import OperationalError, ProgrammingError, connection, connections

from celery_pglock import LockLost, LockMisuse, LockNotAcquired, Raise, advisory, labels
from celery_pglock.keys import key
from celery_pglock.labels import NOBODY, Owner
from celery_pglock.pool import close_leftovers, pool
from celery_pglock.sessions import LockSession
from celery_pglock.voices import Refused
from celery_pglock.wires import MOST_PREPARED
from celery_pglock.work_connections import roll_back_what_was_left
from tests.conftest import ADVISORY_HERE, LOCK_SESSIONS, Rival, wait_until

# How many random interrupts; `INTERRUPTS=3000 make test ARGS='-k random_interrupts'` takes its time.
INTERRUPTS = int(os.environ.get("INTERRUPTS", "300"))


class Interrupted(Exception):
    """As Celery's SoftTimeLimitExceeded: an exception out of a signal handler."""


@pytest.fixture
def interrupt():
    """Raises ``Interrupted`` in the main thread after so many seconds; 0 disarms."""
    armed = []

    def raise_interrupted(_, frame):
        # Not inside of what measures coverage: it would never give its lock back.
        if armed and "coverage" not in frame.f_code.co_filename:
            armed.clear()
            raise Interrupted

    def arm(seconds):
        signal.setitimer(signal.ITIMER_REAL, 0)
        armed[:] = [seconds] if seconds else []
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, raise_interrupted)
    yield arm
    arm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("pooled")
class TestPool:
    def test_a_session_is_kept_for_the_next_lock(self, rival):
        pids = set()
        for number in range(5):
            with advisory(f"number {number}"):
                pids.add(rival.ask(f"SELECT pid FROM pg_locks WHERE {ADVISORY_HERE}"))
        assert len(pids) == 1
        assert rival.ask(LOCK_SESSIONS) == 1

    def test_there_are_as_many_sessions_as_threads_that_hold_locks(self, rival):
        everybody_holds = threading.Barrier(4)

        def hold(number):
            with advisory(f"number {number}"):
                everybody_holds.wait(10)

        threads = [threading.Thread(target=hold, args=[number]) for number in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: rival.sees_advisory_locks() == 3)
        assert rival.ask(LOCK_SESSIONS) == 3
        everybody_holds.wait(10)
        for thread in threads:
            thread.join()
        with advisory("one more"):
            assert rival.ask(LOCK_SESSIONS) == 3

    def test_an_idle_session_is_closed_after_a_while(self, rival, monkeypatch):
        monkeypatch.setattr("celery_pglock.sessions.IDLE_SECONDS", 0.3)
        with advisory("x"):
            pass
        assert rival.ask(LOCK_SESSIONS) == 1
        wait_until(lambda: rival.ask(LOCK_SESSIONS) == 0)
        wait_until(lambda: not [t for t in threading.enumerate() if t.name == "celery_pglock-idle"])
        with advisory("x") as acquired:
            assert acquired

    def test_an_idle_session_says_that_it_is_idle(self, rival):
        session = pool().lease("default", Owner("task", "some-id", "worker"))
        session.take(advisory("x").keys, shared=False, timeout=0)
        assert rival.ask(LOCK_SESSIONS.replace("pglock%%", "pglock:some-id")) == 1
        session.give_back(advisory("x").keys, shared=False)
        pool().give_back(session)
        assert rival.ask(LOCK_SESSIONS.replace("pglock%%", "pglock")) == 1

    def test_an_idle_session_that_has_died_is_replaced(self, rival):
        with advisory("x"):
            pass
        rival.ask(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'pglock'"
            " AND datname = current_database()"
        )
        with advisory("x") as acquired:
            assert acquired

    def test_a_session_survives_a_reload_of_the_server(self, rival):
        with advisory("x"):
            rival.ask("SELECT pg_reload_conf()")
            with advisory("y"):
                pass
        assert rival.ask(LOCK_SESSIONS) == 1

    def test_a_forked_child_neither_harms_nor_uses_its_parents_session(self, rival):
        with advisory("idle first"):
            pass
        with advisory("parents"):
            child = os.fork()
            if not child:
                status = 1
                try:
                    gc.collect()
                    taken = advisory("parents", timeout=0).acquire()
                    with advisory("the child's"):
                        pass
                    pool().close_idle()
                    status = 0 if not taken else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert not rival.could_take("parents")
        assert rival.could_take("parents")

    def test_a_forked_child_that_leaves_the_block_leaves_the_lock_to_its_parent(self, rival):
        child = 1
        try:
            with advisory("parents"):
                child = os.fork()
                if child:
                    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                    assert not rival.could_take("parents")
        finally:
            if not child:
                os._exit(0)
        assert rival.could_take("parents")


def test_in_tests_no_idle_session_keeps_the_database_busy(rival):
    with advisory("x"):
        assert rival.ask(LOCK_SESSIONS) == 1
    wait_until(lambda: rival.ask(LOCK_SESSIONS) == 0)


def statements_logged_by_the_server(raw_connection, function):
    """What the server itself logs of a connection while the function runs."""
    logged = []

    def note(diagnostic):
        if diagnostic.message_primary.startswith(("statement: ", "execute ")):
            logged.append(diagnostic.message_primary)

    raw_connection.execute("SELECT set_config('log_statement', 'all', false)")
    raw_connection.execute("SELECT set_config('client_min_messages', 'log', false)")
    raw_connection.add_notice_handler(note)
    function()
    raw_connection.remove_notice_handler(note)
    return logged


def round_trips(raw_connection, function):
    """How often the server was ready for the next query while the function ran, as libpq has it."""
    with tempfile.TemporaryFile("w+") as trace:
        raw_connection.pgconn.trace(trace.fileno())
        try:
            function()
        finally:
            raw_connection.pgconn.untrace()
        trace.seek(0)
        return trace.read().count("ReadyForQuery")


LOCKS = [
    advisory("a"),
    advisory("a", timeout=0),
    advisory("a", timeout=5),
    advisory("a", timeout=None, shared=True),
    advisory("a", 2, (3, 4), timeout=0),
    advisory("a", 2, (3, 4), timeout=5),
    advisory("a", limit=3, timeout=0),
    advisory("a", "b", limit=3, timeout=5),
]


class TestRoundTrips:
    @pytest.mark.parametrize(
        "lock", LOCKS, ids=lambda lock: f"{lock.name} limit={lock.limit} timeout={lock.timeout}"
    )
    @pytest.mark.usefixtures("pooled")
    def test_one_statement_takes_and_one_gives_back(self, rival, lock):
        with advisory("warm up"):
            session = pool().leased["default"]
        assert len(statements_logged_by_the_server(session._line.connection, lambda: lock.acquire())) == 1
        assert rival.sees_advisory_locks() == len(lock.keys)
        assert len(statements_logged_by_the_server(session._line.connection, lock.release)) == 1
        assert not rival.sees_advisory_locks()

    @pytest.mark.parametrize(
        "lock", LOCKS, ids=lambda lock: f"{lock.name} limit={lock.limit} timeout={lock.timeout}"
    )
    @pytest.mark.usefixtures("pooled")
    def test_each_is_one_round_trip_from_the_first_time_on(self, rival, lock):
        raw = pool().lease("default", NOBODY)._line.connection
        for _ in range(3):
            assert round_trips(raw, lock.acquire) == 1
            assert rival.sees_advisory_locks() == len(lock.keys)
            assert round_trips(raw, lock.release) == 1
            assert not rival.sees_advisory_locks()

    @pytest.mark.usefixtures("pooled")
    def test_a_session_prepares_each_kind_of_statement_once(self, rival):
        raw = pool().lease("default", NOBODY)._line.connection
        logged = statements_logged_by_the_server(
            raw, lambda: [lock.release() for lock in LOCKS * 3 if lock.acquire()]
        )
        assert len(logged) == 2 * 3 * len(LOCKS)
        assert sum("PREPARE" in line for line in logged) == len(
            {line for line in logged if "PREPARE" in line}
        )
        assert all("EXECUTE pglock_" in line for line in logged)

    @pytest.mark.usefixtures("pooled")
    def test_a_session_has_a_bounded_number_of_statements_prepared(self, rival):
        raw = pool().lease("default", NOBODY)._line.connection
        for number in range(1, MOST_PREPARED + 3):
            lock = advisory(*[f"{number}:{one}" for one in range(number)])
            assert lock.acquire()
            assert rival.sees_advisory_locks() == number
            lock.release()
        assert not rival.sees_advisory_locks()
        assert raw.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (MOST_PREPARED,)

    @pytest.mark.usefixtures("pooled")
    @pytest.mark.parametrize(
        "lock", [advisory(*map(str, range(256))), advisory("a", limit=1000)], ids=["keys", "slots"]
    )
    def test_the_server_keeps_no_statement_of_megabytes(self, rival, lock):
        raw = pool().lease("default", NOBODY)._line.connection
        for _ in range(7):
            assert lock.acquire()
            assert rival.sees_advisory_locks() == len(lock.keys)
            lock.release()
        (size,) = raw.execute(
            "SELECT coalesce(sum(total_bytes), 0) FROM pg_backend_memory_contexts"
            " WHERE name LIKE 'CachedPlan%'"
        ).fetchone()
        assert size < 500_000

    @pytest.mark.usefixtures("pooled")
    def test_a_name_that_looks_like_sql_stays_a_name(self, rival):
        owner = Owner("task", "'); SELECT pg_sleep(10) --\\", "worker")
        with advisory("opens it for nobody"):
            pass
        session = pool().lease("default", owner)
        session.take([key("k")], shared=False, timeout=0)
        assert rival.ask(LOCK_SESSIONS.replace("'pglock%%'", "'pglock:''); SELECT pg\\_sleep(10) --%%'")) == 1
        session.give_back([key("k")], shared=False)

    @pytest.mark.usefixtures("pooled")
    def test_after_a_long_wait_the_session_is_asked_whether_it_was_ended(self, rival, pglock_settings):
        pglock_settings(LEASE=1)
        session = pool().lease("default", NOBODY)
        for wait, trips in ((0, 1), (0.3, 2)):
            rival.take("k")
            stepping_aside = threading.Timer(wait, rival.give_back, ["k"])
            stepping_aside.start()
            assert round_trips(session._line.connection, advisory("k", timeout=5).acquire) == trips
            stepping_aside.join()
            advisory("k", timeout=5).release()

    @pytest.mark.usefixtures("pooled")
    def test_after_a_long_wait_a_session_still_says_who_holds_the_lock(self, rival, pglock_settings):
        pglock_settings(LEASE=1)
        rival.take("k")
        threading.Timer(0.3, rival.give_back, ["k"]).start()
        with advisory("k", timeout=5):
            query = rival.ask(
                "SELECT query FROM pg_stat_activity"
                f" WHERE pid = (SELECT pid FROM pg_locks WHERE {ADVISORY_HERE})"
            )
            assert query.startswith("/*pglock:1 ")
            assert query.endswith(":k*/ SELECT pg_backend_pid()")

    @pytest.mark.usefixtures("pooled")
    def test_a_lock_is_not_believed_if_after_a_long_wait_another_backend_answers(
        self, rival, pglock_settings
    ):
        pglock_settings(LEASE=1)
        session = pool().lease("default", NOBODY)
        session._line.backend_pid += 1
        rival.take("k")
        threading.Timer(0.3, rival.give_back, ["k"]).start()
        with pytest.raises(OperationalError, match="may be lost already"):
            session.take([key("k")], shared=False, timeout=5)
        assert session.is_closed
        wait_until(lambda: not rival.sees_advisory_locks())

    @pytest.mark.usefixtures("pooled")
    def test_a_statement_that_could_not_be_prepared_is_prepared_the_next_time(self, rival):
        session = pool().lease("default", NOBODY)
        session._line.connection.execute("SET lock_timeout = 100")
        with rival.connection.transaction():
            rival.connection.execute("LOCK TABLE pg_proc IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(Refused):
                session.take([key("k")], shared=False, timeout=0)
        assert session.take([key("k")], shared=False, timeout=0)
        assert rival.sees_held("k")
        assert session.give_back([key("k")], shared=False)

    @pytest.mark.usefixtures("pooled")
    def test_a_statement_that_was_refused_stays_prepared(self, rival):
        session = pool().lease("default", NOBODY)
        rival.take("k")
        for _ in range(2):
            with pytest.raises(Refused):
                session.take([key("k")], shared=False, timeout=0.05)
        rival.give_back("k")
        assert session.take([key("k")], shared=False, timeout=0.05)
        assert session.give_back([key("k")], shared=False)

    @pytest.mark.parametrize("timeout", [0, 5])
    def test_a_transaction_level_lock_costs_one_statement_more_than_its_transaction(self, rival, timeout):
        connection.ensure_connection()

        def run():
            with advisory("a", "b", xact=True, timeout=timeout):
                assert rival.sees_advisory_locks() == 2

        logged = statements_logged_by_the_server(connection.connection, run)
        assert [line.split()[1] for line in logged if "lock" not in line] == ["BEGIN", "COMMIT"]
        assert len(logged) == 3

    @pytest.mark.usefixtures("pooled")
    def test_a_nested_acquisition_costs_nothing(self, rival):
        with advisory("a"):
            session = pool().leased["default"]

            def nest():
                with advisory("a"):
                    pass

            assert statements_logged_by_the_server(session._line.connection, nest) == []


# The timer that interrupts is the one by which pytest-timeout would.
@pytest.mark.timeout(600, method="thread")
class TestInterrupts:
    def test_an_interrupted_wait_leaves_no_ghost_that_is_granted_the_lock_later(self, rival, interrupt):
        rival.take("taken")
        interrupt(0.3)
        with pytest.raises(Interrupted):
            advisory("taken").acquire()
        wait_until(lambda: not rival.sees_held("taken", granted=False), seconds=2)
        rival.give_back("taken")
        assert rival.could_take("taken")
        with advisory("taken") as acquired:
            assert acquired

    def test_nor_does_one_where_libpq_cannot_cancel_safely(self, rival, interrupt, monkeypatch):
        monkeypatch.setattr("psycopg.capabilities.has_cancel_safe", lambda: False)
        rival.take("taken")
        interrupt(0.3)
        with pytest.raises(Interrupted):
            advisory("taken").acquire()
        wait_until(lambda: not rival.sees_held("taken", granted=False), seconds=1)

    def test_an_interrupted_wait_loses_the_outer_locks_of_its_session(self, rival, interrupt):
        rival.take("taken")
        with pytest.raises(LockLost, match="'outer'"), advisory("outer"):
            interrupt(0.3)
            with pytest.raises(Interrupted):
                advisory("taken").acquire()
            wait_until(lambda: rival.could_take("outer"))

    def test_an_error_of_the_server_while_waiting_is_no_refusal(self, rival):
        rival.take("taken")

        def cancel():
            pid = wait_until(
                lambda: rival.ask(f"SELECT pid FROM pg_locks WHERE {ADVISORY_HERE} AND NOT granted")
            )
            rival.ask("SELECT pg_cancel_backend(%s)", pid)

        cancelling = threading.Thread(target=cancel)
        cancelling.start()
        with pytest.raises(OperationalError, match="canceling statement due to user request"):
            advisory("taken").acquire()
        cancelling.join()
        assert not rival.sees_held("taken", granted=False)

    def test_a_deadlock_is_a_refusal_and_keeps_the_session(self, rival):
        other = Rival()
        other.connection.execute("SET deadlock_timeout = '60s'")
        other.take("theirs")
        arguments = advisory("mine").keys[0].arguments
        waiting = threading.Thread(target=other.ask, args=["SELECT pg_advisory_lock(%s)::text", *arguments])
        with advisory("mine"):
            waiting.start()
            wait_until(lambda: rival.sees_held("mine", granted=False))
            with pytest.raises(LockNotAcquired, match="deadlock"):
                advisory("theirs", side_effect=Raise).acquire()
            assert not rival.could_take("mine")
        waiting.join()
        other.connection.close()

    # What interrupts psycopg while it connects leaves a connection that garbage collection closes.
    @pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.usefixtures("pooled")
    def test_random_interrupts_leave_nothing_that_the_backstop_does_not_find(self, rival, interrupt):
        rival.take("taken")
        interrupted = 0
        for number in itertools.count():
            programs = [
                [advisory("a", "b", timeout=0), advisory("c")],
                [advisory("a", shared=True), advisory("b", limit=3, timeout=0)],
                # Of its own key, as the next one of an interrupted holder is delayed.
                [advisory(f"strict {number}").strictly(), advisory("c", timeout=0)],
                [advisory("a"), advisory("taken", timeout=0.002)],
                [advisory("taken", timeout=0.002)],
                [advisory("a", xact=True), advisory("b")],
            ]
            try:
                interrupt(random.uniform(0.0001, 0.006))
                with ExitStack() as held:
                    for lock in programs[number % len(programs)]:
                        held.enter_context(lock)
                    time.sleep(0.0005)
                interrupt(0)
            except (Interrupted, ProgrammingError):
                # psycopg makes an error of its own of whatever comes while it reads its parameters.
                interrupted += 1
            interrupt(0)
            close_leftovers("the test")
            roll_back_what_was_left("the test")
            if interrupted == INTERRUPTS:
                break
        wait_until(lambda: rival.sees_advisory_locks() == 1, "only the rival's is left")
        pool().close_idle()
        gc.collect()
        wait_until(lambda: not rival.ask(LOCK_SESSIONS))

    def test_an_interrupted_wait_in_a_transaction_leaves_no_ghost_either(self, rival, interrupt):
        rival.take("taken")
        interrupt(0.3)
        with pytest.raises(Interrupted):
            advisory("taken", xact=True).__enter__()
        wait_until(lambda: not rival.sees_held("taken", granted=False), seconds=2)
        with advisory("other", xact=True) as acquired:
            assert acquired


def test_garbage_that_gives_a_lock_back_does_not_deadlock_the_pool(rival, pooled):
    def generator():
        with advisory("k"):
            yield

    suspended = generator()
    next(suspended)
    with pool()._lock:
        del suspended
        gc.collect()
    assert rival.could_take("k")


def test_nothing_is_taken_where_no_thread_can_be_started_to_watch_it(rival, pooled, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"), advisory("k"):
        pytest.fail("it must not run")
    wait_until(lambda: rival.ask(LOCK_SESSIONS) == 0)


def test_a_transaction_that_a_task_left_open_is_rolled_back(rival, caplog):
    connection.ensure_connection()
    hold = advisory("k", xact=True).take()
    connection.close()
    roll_back_what_was_left("Task x[1]")
    assert "Task x[1] ended inside of a transaction on alias 'default'" in caplog.text
    with advisory("k", xact=True) as acquired:
        assert acquired
    del hold


def test_a_backstop_closes_what_a_task_left_behind(rival, caplog):
    advisory("left behind").acquire()
    close_leftovers("Task x[1]")
    wait_until(lambda: rival.could_take("left behind"))
    assert "Task x[1] ended with locks on alias 'default'" in caplog.text


def test_a_session_is_built_from_the_settings_of_its_alias(rival, monkeypatch):
    settings = connections["locks"].settings_dict
    monkeypatch.setitem(settings, "OPTIONS", {**settings["OPTIONS"], "assume_role": "pg_monitor"})
    session = LockSession("locks", Owner(task_id="some-id"))
    row = session.rows(
        "SELECT current_user::text, current_database(), current_setting('statement_timeout')", []
    )[0]
    assert row == ("pg_monitor", connection.settings_dict["NAME"], "0")
    assert rival.ask(LOCK_SESSIONS.replace("pglock%%", "pglock:some-id")) == 1
    session.close()


def test_a_server_that_is_too_old_is_refused(rival, monkeypatch):
    # No server of that age can be had here: so the one that answers is made too old.
    monkeypatch.setattr("celery_pglock.raw_connections.OLDEST_SERVER", 990000)
    with pytest.raises(LockMisuse, match="14 is the oldest that can end a silent session"):
        advisory("k").acquire()
    assert not rival.ask(LOCK_SESSIONS)


def test_timeouts_of_the_database_do_not_end_a_lock(rival):
    database = connection.settings_dict["NAME"]
    timeouts = ["idle_session_timeout", "statement_timeout"]
    if rival.connection.info.server_version >= 170000:
        timeouts.append("transaction_timeout")
    for timeout in timeouts:
        rival.connection.execute(f'ALTER DATABASE "{database}" SET {timeout} = 200')
    rival.take("taken")
    try:
        with advisory("long"):
            time.sleep(0.5)
            assert not advisory("taken", timeout=0.5).acquire()
            assert not rival.could_take("long")
    finally:
        rival.connection.execute(f'ALTER DATABASE "{database}" RESET ALL')


def test_labels_name_the_task_to_everybody_who_may_read_them(rival, pglock_settings):
    for shown in (True, False):
        pglock_settings(SHOW_NAMES=shown)
        with advisory("50% */ off"):
            query = rival.ask(
                f"SELECT query FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE {ADVISORY_HERE}"
            )
            assert query.startswith("/*pglock:1 task= id= worker= key=1:")
            assert ("50%25%20%2A%2F%20off" in query) is shown


def told(rival, session):
    """What the session's label says that it holds, by name, with since when."""
    found = labels.read(rival.ask("SELECT query FROM pg_stat_activity WHERE pid = %s", session.backend_pid))
    return {holding.key.name: holding.since for holding in found.holdings}


def test_a_label_names_a_key_as_long_as_it_is_held_in_either_mode(rival):
    with advisory("outer"), advisory("k"):
        session = pool().leased["default"]
        with advisory("k", shared=True):
            assert set(told(rival, session)) == {"outer", "k"}
        assert set(told(rival, session)) == {"outer", "k"}


def test_a_label_counts_from_the_beginning_when_a_key_is_taken_anew(rival):
    with advisory("outer"):
        session = pool().leased["default"]
        for _ in range(2):
            with advisory("k"):
                # Nobody knows yet when the statement with the label will have it.
                assert told(rival, session)["k"] is None
                with advisory("inner"):
                    assert told(rival, session)["k"] >= told(rival, session)["outer"]
