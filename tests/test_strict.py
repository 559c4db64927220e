"""Strict locks: fencing tokens, and the delay after a holder that did not leave in order."""

import threading
import time
from contextlib import suppress

import psycopg
import pytest
from django.core.management import call_command
from django.db import OperationalError, connection, connections, transaction

from celery_pglock import AdvisoryTask, LockMisuse, advisory
from celery_pglock.fences import IsNewest, Token
from celery_pglock.held_locks import HeldLock
from celery_pglock.interruptions import Interruption
from celery_pglock.models import KeyState
from celery_pglock.pool import pool
from tests.celery_app import app
from tests.conftest import ADVISORY_HERE, wait_until
from tests.models import Entry
from tests.servers import Cluster
from tests.test_sessions import statements_logged_by_the_server

LEASE = 1.0


@pytest.fixture(autouse=True)
def _lease_of_a_second(pglock_settings):
    pglock_settings(LEASE=LEASE)


def strict(*ids, **options):
    return advisory(*ids, **options).strictly()


def taken(*ids, **options):
    hold = strict(*ids, **options).take()
    assert hold.session
    return hold


def token_of(hold):
    return HeldLock(hold, True, Interruption()).token


def state_key(name):
    (key,) = advisory(name).keys
    return key


def state(key="k"):
    found = state_key(key)
    return KeyState.objects.get(pk=(found.objsubid, found.classid, found.objid))


def seconds_to_take(*ids, **options):
    started = time.monotonic()
    hold = taken(*ids, **options)
    took = time.monotonic() - started
    hold.give_back()
    return took


def end_the_session(rival, hold):
    rival.ask("SELECT pg_terminate_backend(%s, 5000)", hold.session.backend_pid)
    wait_until(lambda: hold.loss)
    assert not hold.give_back()


class TestTokens:
    @pytest.mark.parametrize("timeout", [0, 5, None])
    def test_a_later_holder_has_a_higher_one(self, rival, timeout):
        tokens = []
        for _ in range(3):
            hold = taken("k", timeout=timeout)
            tokens.append(token_of(hold))
            hold.give_back()
        assert tokens == sorted(set(tokens))

    def test_who_waited_for_a_holder_has_a_higher_one_than_it(self, rival):
        tokens = []

        def wait():
            hold = taken("k")
            tokens.append(token_of(hold))
            hold.give_back()
            connections.close_all()

        waiting = threading.Thread(target=wait)
        hold = taken("k")
        waiting.start()
        wait_until(lambda: rival.sees_held("k", granted=False))
        hold.give_back()
        waiting.join()
        assert tokens[0] > token_of(hold)

    def test_a_refusal_gives_none(self, rival):
        rival.take("k")
        assert not strict("k", timeout=0).acquire()
        assert not strict("k", timeout=0.1).acquire()
        assert not KeyState.objects.exists()

    def test_several_keys_have_one(self, rival):
        hold = taken("a", "b")
        rows = [state("a"), state("b")]
        assert {Token(row.timeline, row.number) for row in rows} == {token_of(hold)}
        hold.give_back()
        assert all(row.is_clean for row in KeyState.objects.all())

    def test_a_nested_acquisition_has_the_same_and_only_the_last_leaves(self, rival):
        outer = taken("k")
        inner = taken("k")
        assert inner.tokens == outer.tokens
        inner.give_back()
        assert not state().is_clean
        outer.give_back()
        assert state().is_clean

    def test_a_key_that_is_held_already_without_one_gets_one(self, rival):
        with advisory("k", "l"):
            hold = taken("k")
            assert token_of(hold) == Token(state().timeline, state().number)
            hold.give_back()
            assert not rival.could_take("k")
        assert rival.could_take("k")
        assert state().is_clean

    def test_nested_locks_that_share_a_key_have_one_for_each(self, rival):
        Entry.objects.create(key="guarded", what="0")
        outer = taken("a")
        inner = taken("a", "b")
        for hold in (inner, outer):
            assert HeldLock(hold, True, Interruption()).guard(Entry.objects.all()).update(what="1") == 1
        assert token_of(inner) > token_of(outer)
        inner.give_back()
        outer.give_back()
        assert all(row.is_clean for row in KeyState.objects.all())

    def test_a_server_whose_timeline_starts_anew_gives_out_no_lower_one(self, rival):
        taken("k").give_back()
        KeyState.objects.update(timeline=3)
        hold = taken("k")
        assert token_of(hold).timeline == 3
        hold.give_back()

    def test_it_is_one_statement_to_take_and_one_to_give_back(self, rival, pooled):
        with strict("k"):
            raw = pool().leased["default"]._line.connection
        for timeout in (0, 5):
            lock = strict("k", timeout=timeout)
            assert len(statements_logged_by_the_server(raw, lock.acquire)) == 1
            assert len(statements_logged_by_the_server(raw, lock.release)) == 1

    def test_the_commit_is_flushed_even_where_others_are_not(self, rival):
        with strict("k"):
            shown = pool().leased["default"].rows("SELECT current_setting('synchronous_commit')", [])
        assert shown == [("on",)]


class TestHandover:
    def test_a_holder_that_left_in_order_is_not_waited_for(self, rival):
        taken("k").give_back()
        assert seconds_to_take("k") < LEASE / 2

    def test_a_holder_whose_session_was_ended_is_waited_for(self, rival, caplog):
        caplog.set_level("INFO")
        end_the_session(rival, taken("k"))
        assert 0.6 * LEASE < seconds_to_take("k") < 5
        assert "lock 'k' was not given back by its last holder" in caplog.text
        assert seconds_to_take("k") < LEASE / 2

    @pytest.mark.parametrize("timeout", [0, 5])
    def test_by_its_own_lease_and_not_by_ours(self, rival, pglock_settings, timeout):
        pglock_settings(LEASE=2)
        end_the_session(rival, taken("k"))
        pglock_settings(LEASE=1)
        assert 1.2 < seconds_to_take("k", timeout=timeout) < 5

    def test_by_the_longest_of_those_who_left_without_order_one_after_the_other(self, rival, pglock_settings):
        pglock_settings(LEASE=2)
        end_the_session(rival, taken("k"))
        pglock_settings(LEASE=1)
        KeyState.objects.update(task_id="interrupted in its delay")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("celery_pglock.claims.LOCK_DELAY", 0)
            hold = taken("k")
        end_the_session(rival, hold)
        assert 1.2 < seconds_to_take("k") < 5

    def test_a_failover_is_no_order(self, rival):
        taken("k").give_back()
        KeyState.objects.update(timeline=0)
        assert seconds_to_take("k") > 0.6 * LEASE

    def test_the_lock_is_kept_and_heard_meanwhile(self, rival, pglock_settings):
        pglock_settings(LEASE=4)
        end_the_session(rival, taken("k"))
        pglock_settings(LEASE=LEASE)
        waiting = threading.Thread(target=seconds_to_take, args=["k"])
        waiting.start()
        wait_until(lambda: rival.sees_held("k"))
        time.sleep(1.5 * LEASE)
        assert not rival.could_take("k")
        waiting.join()

    def test_who_is_interrupted_while_waiting_does_not_count_as_the_last_holder_in_order(
        self, rival, monkeypatch
    ):
        end_the_session(rival, taken("k"))

        def interrupted(_):
            raise InterruptedError

        with monkeypatch.context() as patch:
            patch.setattr("celery_pglock.claims.time.sleep", interrupted)
            with pytest.raises(InterruptedError):
                strict("k").take()
        assert rival.could_take("k")
        assert not state().is_clean
        assert seconds_to_take("k") > 0.6 * LEASE

    def test_a_lock_that_is_lost_while_it_waits_is_not_obtained(self, rival):
        end_the_session(rival, taken("k"))

        def end_again():
            wait_until(lambda: rival.sees_held("k"))
            rival.ask(f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE {ADVISORY_HERE}")

        ending = threading.Thread(target=end_again)
        ending.start()
        with pytest.raises(OperationalError, match="lost while it waited"):
            strict("k").take()
        ending.join()


class TestGuards:
    @pytest.fixture
    def entry(self, rival):
        return Entry.objects.create(key="guarded", what="0")

    def written(self, hold, what):
        guarded = HeldLock(hold, True, Interruption()).guard(Entry.objects.filter(key="guarded"))
        return guarded.update(what=what)

    def test_the_holder_writes(self, entry):
        hold = taken("a", "b")
        assert self.written(hold, "mine") == 1
        hold.give_back()

    def test_a_holder_before_the_last_writes_nothing(self, rival, entry):
        stale = taken("k")
        end_the_session(rival, stale)
        # Nobody has come after it yet.
        assert self.written(stale, "late") == 1
        newest = taken("k")
        assert self.written(stale, "too late") == 0
        assert self.written(newest, "newest") == 1
        newest.give_back()
        assert Entry.objects.get().what == "newest"

    def test_nobody_comes_after_it_before_its_transaction_ends(self, rival, entry):
        stale = taken("k")
        with transaction.atomic():
            assert self.written(stale, "guarded") == 1
            end_the_session(rival, stale)
            taking = threading.Thread(target=seconds_to_take, args=["k"])
            taking.start()
            wait_until(lambda: rival.sees_held("k"))
            blocked = f"SELECT cardinality(pg_blocking_pids(pid)) FROM pg_locks WHERE {ADVISORY_HERE}"
            wait_until(lambda: rival.ask(blocked) == 1, "the next holder waits for the transaction")
        taking.join()

    def test_whoever_is_held_up_by_such_a_transaction_for_too_long_does_not_get_the_lock(
        self, rival, entry, pglock_settings
    ):
        stale = taken("k")
        with transaction.atomic():
            assert self.written(stale, "guarded") == 1
            end_the_session(rival, stale)
            assert not strict("k", timeout=0).acquire()
            assert not rival.sees_held("k")

    def test_giving_back_inside_of_such_a_transaction_is_only_less_orderly(self, rival, entry, caplog):
        hold = taken("k")
        with transaction.atomic():
            assert self.written(hold, "guarded") == 1
            assert hold.give_back()
            assert rival.could_take("k")
        assert "The next strict holder of 'k' will wait" in caplog.text
        assert not state().is_clean

    def test_deleted_rows_repeat_no_token(self, rival, entry):
        stale = taken("k")
        end_the_session(rival, stale)
        KeyState.objects.all().delete()
        newest = taken("k")
        assert token_of(newest) > token_of(stale)
        assert self.written(stale, "too late") == 0
        newest.give_back()

    def test_with_locks_held_outside_the_wait_for_it_ends_in_time(self, rival, entry):
        stale = taken("k")
        with transaction.atomic():
            assert self.written(stale, "guarded") == 1
            end_the_session(rival, stale)
            with advisory("outer"):
                assert not strict("k", timeout=5).acquire()
                assert not rival.could_take("outer")

    def test_serializable_by_default_is_no_obstacle(self, rival):
        database = connection.settings_dict["NAME"]
        rival.connection.execute(
            f"ALTER DATABASE \"{database}\" SET default_transaction_isolation = 'repeatable read'"
        )
        try:
            first = taken("k")
            waiting = threading.Thread(target=seconds_to_take, args=["k"])
            waiting.start()
            wait_until(lambda: rival.sees_held("k", granted=False))
            first.give_back()
            waiting.join()
            assert state().is_clean
            assert state().number > token_of(first).number
        finally:
            rival.connection.execute(f'ALTER DATABASE "{database}" RESET ALL')

    def test_what_is_in_another_database_cannot_be_guarded(self, rival, monkeypatch):
        hold = taken("k")
        monkeypatch.setitem(connections["locks"].settings_dict, "NAME", "another")
        with pytest.raises(LockMisuse, match="in another database than 'locks'"):
            HeldLock(hold, True, Interruption()).guard(Entry.objects.using("locks"))
        hold.give_back()

    def test_a_condition_can_stand_among_others(self, entry):
        hold = taken("k")
        guarded = Entry.objects.filter(IsNewest(hold.tokens), key="guarded").exclude(what="9")
        assert guarded.exists()
        assert not Entry.objects.filter(~IsNewest(hold.tokens)).exists()
        hold.give_back()


@pytest.fixture
def breaking(rival, django_db_blocker):
    """Points an alias at a server of the test's own."""
    server = {"HOST": "127.0.0.1", "NAME": "postgres", "USER": "postgres"}

    def lead_to(cluster):
        leave()
        connections.databases["breaking"] = {
            **connections.databases["default"],
            **server,
            "PORT": str(cluster.port),
        }

    def leave():
        if "breaking" in connections.databases:
            connections["breaking"].close()
            del connections["breaking"]
            del connections.databases["breaking"]

    with django_db_blocker.unblock():
        yield lead_to
        leave()


def replayed(standby):
    """The newest token of which a standby knows."""
    with psycopg.connect(standby.url) as replica, suppress(psycopg.errors.UndefinedTable):
        return replica.execute("SELECT max(number) FROM celery_pglock_keystate").fetchone()[0]


@pytest.mark.long
def test_tokens_rise_over_crashes_and_failovers_that_forget_some(breaking):
    def next_token():
        hold = strict("k", using="breaking").take()
        hold.give_back()
        return token_of(hold)

    with Cluster() as cluster, cluster.standby() as standby:
        breaking(cluster)
        call_command("migrate", "celery_pglock", database="breaking", verbosity=0)
        tokens = [next_token()]
        connections["breaking"].close()
        cluster.restart("immediate")
        tokens.append(next_token())
        wait_until(lambda: replayed(standby) == tokens[-1].number, "the standby has followed")
        # Of what follows it sees nothing; a sequence is logged some 32 numbers ahead.
        standby.stop()
        tokens += [next_token() for _ in range(70)]
        cluster.stop("immediate")
        standby.start()
        standby.promote()
        breaking(standby)
        tokens.append(next_token())
    assert tokens == sorted(set(tokens))
    assert [token.timeline for token in tokens[-2:]] == [1, 2]
    assert tokens[-1].number < tokens[-2].number


class TestTasks:
    def test_the_body_sees_its_token_and_guards(self, rival):
        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k", lock_strict=True)
        def guards(self):
            self.lock.check()
            assert str(self.lock) == "k"
            written = self.lock.guard(Entry.objects.filter(key="x")).update(what="guarded")
            return [*self.lock.token, written]

        Entry.objects.create(key="x", what="0")
        timeline, number, written = guards.apply().get()
        assert (timeline, number) == (state().timeline, state().number)
        assert written == 1

    def test_the_setting_makes_all_session_level_locks_strict(self, rival, pglock_settings):
        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k")
        def tells(self):
            return self.lock.token

        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k", lock_xact=True)
        def tells_in_transaction(self):
            return self.lock.token

        @app.task(shared=False, base=AdvisoryTask, lock_key="k", lock_shared=True)
        def shares():
            return "done"

        with pytest.raises(LockMisuse, match="has no fencing token: its task needs lock_strict=True"):
            tells.apply().get()
        pglock_settings(STRICT=True)
        assert tells.apply().get()[0] == 1
        with pytest.raises(LockMisuse, match="has no fencing token"):
            tells_in_transaction.apply().get()
        with pytest.raises(LockMisuse, match="does not go with lock_shared"):
            shares.apply().get()

    def test_without_locks_every_token_is_the_lowest_and_nothing_is_guarded(self, rival, pglock_settings):
        pglock_settings(ENABLED=False)

        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k", lock_strict=True)
        def guards_nothing(self):
            return [*self.lock.token, self.lock.guard(Entry.objects.filter(key="x")).update(what="1")]

        Entry.objects.create(key="x", what="0")
        assert guards_nothing.apply().get() == [0, 0, 1]

    def test_outside_of_a_body_there_is_no_lock_to_ask(self):
        @app.task(shared=False, base=AdvisoryTask, bind=True, lock_key="k")
        def idle(self):
            return "done"

        with pytest.raises(LockMisuse, match=r"self\.lock is for the body alone"):
            idle.lock  # noqa: B018 - reading it is the claim

    def test_a_missing_table_is_told_with_the_command_that_makes_it(self, rival):
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE celery_pglock_keystate RENAME TO elsewhere")
        try:
            with pytest.raises(LockMisuse, match=r"manage\.py migrate --database=default"):
                strict("k").acquire()
        finally:
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE elsewhere RENAME TO celery_pglock_keystate")
        assert not rival.sees_advisory_locks()
