"""What is done to backends is written down before it is done."""

import getpass
import hashlib
import logging

import pytest
from django.core.management import call_command
from django.db import OperationalError, connection, transaction

from celery_pglock import LockMisuse, advisory, prioritize, signals
from celery_pglock.audits import acting
from celery_pglock.models import Act, Outcome, PGActivity, PGLock
from tests.conftest import Rival

SECRET = "SELECT 'secret', pg_advisory_lock(7)"


@pytest.fixture
def victim(rival):
    rival.connection.execute("SET application_name = 'report'")
    rival.connection.execute(SECRET)
    return rival


@pytest.fixture
def keeper(transactional_db):
    somebody = Rival()
    yield somebody
    somebody.connection.close()


def pid_of(rival):
    return rival.connection.info.backend_pid


def chosen(victim):
    return PGLock.objects.pid(pid_of(victim)).filter(type="ADVISORY")


def test_an_act_names_the_task_for_which_the_backend_works(victim):
    victim.connection.execute("SET application_name = 'pglock:some-task'")
    chosen(victim).terminate_activity()
    assert Act.objects.get().task_id == "some-task"


def lock(keeper, model):
    keeper.connection.execute("BEGIN")
    keeper.connection.execute(f"LOCK TABLE {model._meta.db_table} IN ACCESS EXCLUSIVE MODE")


def is_alive(victim):
    return victim.connection.execute("SELECT 1").fetchone() == (1,)


def test_an_act_says_who_was_chosen_and_why_and_what_became_of_it(victim):
    backend = PGActivity.objects.get(pk=pid_of(victim))
    row = chosen(victim).get().pk
    (stop,) = chosen(victim).terminate_activity()
    act = Act.objects.select_related("outcome").get()
    assert (act.action, act.pid, act.backend_start) == ("terminate", backend.pk, backend.backend_start)
    assert (act.application_name, act.role, act.client_addr) == ("report", "postgres", backend.client_addr)
    assert (act.reason, act.outcome.outcome) == (row, stop.outcome) == (row, "terminated")
    assert (act.task_id, act.comes_back) == ("", None)
    assert act.query_hash == hashlib.md5(SECRET.encode()).hexdigest()  # noqa: S324 - as PostgreSQL's md5()
    assert "secret" not in repr(vars(act))
    assert act.at <= act.outcome.at


def test_what_was_not_stopped_is_written_down_too(victim):
    (stop,) = PGActivity.objects.pid(pid_of(victim)).cancel()
    assert list(Act.objects.values_list("action", "outcome__outcome")) == [("cancel", stop.outcome)]
    assert stop.outcome == "idle"


def test_who_acts_through_which_door_is_written_down(victim):
    PGActivity.objects.pid(pid_of(victim)).cancel()
    with acting("report", "celery@web1"):
        PGActivity.objects.pid(pid_of(victim)).cancel()
    PGActivity.objects.pid(pid_of(victim)).cancel()
    call_command("pglock", str(pid_of(victim)), "--terminate", "--yes", verbosity=0)
    assert list(Act.objects.order_by("pk").values_list("through", "by", "action")) == [
        ("code", "", "cancel"),
        ("report", "celery@web1", "cancel"),
        ("code", "", "cancel"),
        ("command", getpass.getuser(), "terminate"),
    ]


def test_prioritize_is_a_door_of_its_own(victim):
    with prioritize(interval=0.1), advisory(7) as acquired:
        assert acquired
    assert Act.objects.get().through == "prioritize"


def test_what_cannot_be_written_down_is_not_done(victim, keeper):
    lock(keeper, Act)
    with pytest.raises(OperationalError, match="lock timeout"):
        chosen(victim).terminate_activity()
    keeper.connection.execute("ROLLBACK")
    assert is_alive(victim)
    assert not Act.objects.exists()


def test_an_outcome_that_cannot_be_written_down_stops_nobody_from_being_stopped(victim, keeper, caplog):
    other = Rival()
    other.connection.execute("SELECT pg_advisory_lock(8)")
    lock(keeper, Outcome)
    stops = PGActivity.objects.pid(pid_of(victim), pid_of(other)).terminate()
    keeper.connection.execute("ROLLBACK")
    other.connection.close()
    assert [stop.outcome for stop in stops] == ["terminated"] * 2
    assert Act.objects.filter(outcome=None).count() == 2
    assert caplog.text.count("could not be written down") == 2


def test_it_stays_when_the_transaction_around_it_is_rolled_back(victim):
    with transaction.atomic():
        chosen(victim).terminate_activity()
        transaction.set_rollback(True)
    assert Outcome.objects.get().outcome == "terminated"


def test_without_its_table_nobody_is_stopped_and_the_migration_is_named(victim):
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {Act._meta.db_table} RENAME TO elsewhere")
        try:
            with pytest.raises(LockMisuse, match="migrate celery_pglock --database=default"):
                chosen(victim).terminate_activity()
        finally:
            cursor.execute(f"ALTER TABLE elsewhere RENAME TO {Act._meta.db_table}")
    assert is_alive(victim)


def test_a_signal_tells_of_each_and_a_receiver_that_fails_does_no_harm(victim, caplog):
    caplog.set_level(logging.ERROR)
    told = []

    def fails(**_):
        raise ZeroDivisionError

    def notes(stop, action, using, **_):
        told.append((stop.pid, stop.outcome, action, using))

    signals.backend_stopped.connect(fails)
    signals.backend_stopped.connect(notes)
    try:
        chosen(victim).terminate_activity()
    finally:
        signals.backend_stopped.disconnect(fails)
        signals.backend_stopped.disconnect(notes)
    assert told == [(pid_of(victim), "terminated", "terminate", "default")]
