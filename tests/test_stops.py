"""Cancelling and terminating: whom it hits, whom it spares, and what it tells."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone

import pytest
from django.db import connection, transaction

from celery_pglock import backends
from celery_pglock.backends import Victim
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock
from tests.bystanders import bystanders
from tests.conftest import wait_until

pytestmark = pytest.mark.django_db(transaction=True)

# Roles are the whole server's; all who collect these tests must call them the same.
PREFIX = f"pglock_{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
APP, OTHER, SIGNALS, READS_TOO = (f"{PREFIX}_{name}" for name in ("app", "other", "signals", "reads"))
VIEWS = "celery_pglock_pgactivity, celery_pglock_pglock, celery_pglock_blockedpglock"


@pytest.fixture
def session():
    with bystanders() as make:
        yield make


def execute(*statements):
    with connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.fixture
def roles():
    names = (APP, OTHER, SIGNALS, READS_TOO)
    execute(
        *(f"CREATE ROLE {name} LOGIN PASSWORD 'x'" for name in names),
        f"GRANT pg_signal_backend TO {SIGNALS}, {READS_TOO}",
        f"GRANT pg_read_all_stats TO {READS_TOO}",
        f"GRANT SELECT ON {VIEWS} TO {', '.join(names)}",
    )
    yield
    execute(
        f"REVOKE ALL ON {VIEWS} FROM {', '.join(names)}",
        *(f"DROP ROLE {name}" for name in names),
    )


@contextmanager
def acting_as(role):
    execute(f"SET ROLE {role}")
    try:
        yield
    finally:
        execute("RESET ROLE")


def outcomes(stops):
    return {stop.pid: stop.outcome for stop in stops}


def victims(*sessions):
    return PGActivity.objects.pid(*(one.pid for one in sessions))


class TestOutcomes:
    def test_a_wait_is_cancelled(self, session):
        holder, waiter = session(), session()
        holder.does("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        (stop,) = BlockedPGLock.objects.cancel_activity()
        assert (stop.pid, stop.outcome, stop.is_done) == (waiter.pid, "cancelled", True)
        assert waiter.answers() == "57014"
        assert holder.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") >= 1

    def test_who_is_in_the_way_is_terminated_and_who_waited_goes_on(self, session):
        holder, waiter = session(), session()
        holder.does("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        assert outcomes(BlockedPGLock.objects.terminate_blocking_activity()) == {holder.pid: "terminated"}
        assert waiter.answers() == ""
        assert PGLock.objects.get(type="ADVISORY").activity_id == waiter.pid

    def test_another_transaction_of_the_same_backend_is_not_what_was_chosen(self, session):
        holder = session()
        holder.does("BEGIN", "LOCK TABLE tests_entry")
        chosen = PGLock.objects.on("tests.Entry")
        row, pid, start, name = chosen.values_list(
            "pk", "activity_id", "activity__backend_start", "activity__application_name"
        ).get()
        holder.does("COMMIT", "BEGIN", "LOCK TABLE tests_entry")
        (stop,) = backends.terminate([Victim(pid, start, name, (row,))], PGLock._meta.db_table, "default")
        assert stop.outcome == "gone"
        holder.does("SELECT 1")

    def test_who_runs_nothing_is_idle_and_not_cancelled(self, session):
        holder = session()
        holder.does("BEGIN", "SELECT pg_advisory_lock(7)")
        (stop,) = PGLock.objects.filter(type="ADVISORY").cancel_activity()
        assert (stop.outcome, stop.is_done) == ("idle", False)
        assert "only terminating it frees" in str(stop)
        holder.does("SELECT 1")

    def test_what_runs_is_cancelled_once_however_many_locks_it_has(self, session):
        busy = session()
        busy.does("SELECT pg_advisory_lock(1), pg_advisory_lock(2), pg_advisory_lock(3)")
        busy.sends("SELECT pg_sleep(60)")
        wait_until(lambda: PGActivity.objects.get(id=busy.pid).state == "ACTIVE")
        found = PGLock.objects.filter(type="ADVISORY")
        assert found.count() == 3
        assert outcomes(found.cancel_activity()) == {busy.pid: "cancelled"}
        assert busy.answers() == "57014"

    def test_a_backend_that_does_not_end_is_said_to_be_ending_still(self, session, monkeypatch):
        stuck = session()
        os.kill(stuck.pid, signal.SIGSTOP)
        try:
            assert outcomes(victims(stuck).terminate()) == {stuck.pid: "still ending"}
        finally:
            os.kill(stuck.pid, signal.SIGCONT)
        wait_until(lambda: not victims(stuck).exists())

    def test_nobody_stops_himself(self, session):
        other = session()
        other.does("SELECT pg_advisory_lock(7)")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid(), pg_advisory_xact_lock(8)")
            own = cursor.fetchone()[0]
        assert outcomes(PGActivity.objects.pid(own).terminate()) == {own: "gone"}
        assert outcomes(PGActivity.objects.pid(own).cancel()) == {own: "gone"}
        assert PGActivity.objects.filter(id=own).exists()

    def test_nothing_chosen_stops_nobody(self):
        assert (
            PGLock.objects.none().terminate_activity()
            == PGLock.objects.filter(objid=1).cancel_activity()
            == ()
        )


class TestVictimsThatChanged:
    def victim(self, session, *rows):
        backend = PGActivity.objects.get(id=session.pid)
        return Victim(session.pid, backend.backend_start, backend.application_name, rows)

    @pytest.mark.parametrize("stop", [backends.cancel, backends.terminate])
    def test_a_lock_that_was_freed_saves_its_holder(self, session, stop):
        holder = session()
        holder.does("SELECT pg_advisory_lock(7), pg_advisory_lock(8)")
        lock = PGLock.objects.get(objid=7)
        victim = self.victim(holder, lock.id)
        holder.does("SELECT pg_advisory_unlock(7)")
        (outcome,) = stop([victim], "celery_pglock_pglock", "default")
        assert outcome.outcome == "gone"
        holder.does("SELECT 1")

    @pytest.mark.parametrize("stop", [backends.cancel, backends.terminate])
    def test_a_pid_of_somebody_else_is_spared(self, session, stop):
        holder = session()
        holder.does("SELECT pg_advisory_lock(7)")
        lock = PGLock.objects.get(objid=7)
        victim = replace(
            self.victim(holder, lock.id), backend_start=datetime(2020, 1, 1, tzinfo=timezone.utc)
        )
        (outcome,) = stop([victim], "celery_pglock_pglock", "default")
        assert outcome.outcome == "gone"
        holder.does("SELECT 1")

    @pytest.mark.parametrize("stop", [backends.cancel, backends.terminate])
    def test_a_session_that_works_for_another_task_by_now_is_spared(self, session, stop):
        holder = session()
        holder.does("SET application_name = 'pglock:first'", "SELECT pg_advisory_lock(7)")
        victim = self.victim(holder, PGLock.objects.get(objid=7).id)
        holder.does("SET application_name = 'pglock:second'")
        (outcome,) = stop([victim], "celery_pglock_pglock", "default")
        assert outcome.outcome == "gone"
        holder.does("SELECT 1")

    def test_who_has_ended_is_gone(self, session):
        holder = session()
        victim = self.victim(holder, holder.pid)
        holder.connection.close()
        wait_until(lambda: not PGActivity.objects.filter(id=holder.pid).exists())
        (outcome,) = backends.terminate([victim], "celery_pglock_pgactivity", "default")
        assert outcome.outcome == "gone"

    def test_who_no_longer_is_in_the_way_is_spared(self, session):
        holder, waiter = session(), session()
        holder.does("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        wait = BlockedPGLock.objects.get()
        victim = self.victim(holder, wait.id)
        holder.does("SELECT pg_advisory_unlock(7)")
        assert waiter.answers() == ""
        (outcome,) = backends.terminate([victim], "celery_pglock_blockedpglock", "default")
        assert outcome.outcome == "gone"
        holder.does("SELECT 1")

    def test_within_a_transaction_victims_are_read_anew(self, session):
        holder = session()
        with transaction.atomic():
            assert PGActivity.objects.filter(id=holder.pid, state="IDLE").exists()
            holder.sends("SELECT pg_sleep(60)")
            wait_until(lambda: holder.is_busy)
            stops = wait_until(lambda: [stop for stop in victims(holder).cancel() if stop.is_done])
            assert outcomes(stops) == {holder.pid: "cancelled"}
        assert holder.answers() == "57014"


@pytest.mark.usefixtures("roles")
class TestRoles:
    @pytest.mark.parametrize(
        ("actor", "stopped"),
        [(APP, {APP}), (OTHER, {OTHER}), (SIGNALS, set()), (READS_TOO, {APP, OTHER})],
    )
    def test_one_refusal_neither_stops_the_batch_nor_ends_the_transaction(self, session, actor, stopped):
        by_role = {role: session(role, password="x") for role in (APP, OTHER)}
        by_role["superuser"] = session()
        with acting_as(actor), transaction.atomic():
            told = outcomes(victims(*by_role.values()).terminate())
            assert PGActivity.objects.exists()
        assert told == {
            somebody.pid: "terminated" if role in stopped else "not permitted"
            for role, somebody in by_role.items()
        }
        left = set(victims(*by_role.values()).values_list("id", flat=True))
        assert left == {somebody.pid for role, somebody in by_role.items() if role not in stopped}

    def test_who_may_not_look_is_told_so_and_sees_the_locks(self, session):
        holder = session(APP, password="x")
        holder.does("SELECT pg_advisory_lock(7)")
        with acting_as(OTHER):
            lock = PGLock.objects.select_related("activity").get(type="ADVISORY")
            assert (lock.activity_id, lock.activity.state, lock.activity.backend_start) == (
                holder.pid,
                None,
                None,
            )
            assert (lock.activity.query, lock.name) == ("<insufficient privilege>", "")
            (stop,) = PGLock.objects.filter(type="ADVISORY").cancel_activity()
        assert stop.outcome == "not permitted"
        assert "pg_read_all_stats" in str(stop)

    @pytest.mark.parametrize("actor", [APP, READS_TOO])
    def test_cancelling_asks_for_the_same_rights(self, session, actor):
        mine, foreign = session(APP, password="x"), session()
        for somebody in (mine, foreign):
            somebody.sends("SELECT pg_sleep(60)")
            wait_until(lambda pid=somebody.pid: PGActivity.objects.get(id=pid).state == "ACTIVE")
        with acting_as(actor):
            told = outcomes(victims(mine, foreign).cancel())
        assert told == {mine.pid: "cancelled", foreign.pid: "not permitted"}
        assert mine.answers() == "57014"
        assert foreign.is_busy
