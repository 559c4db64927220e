"""Who waits is asked for first, and the locks are read for those who wait alone."""

import json

import pytest
from django.db import connection, transaction

from celery_pglock import LockMisuse, advisory
from celery_pglock.keys import key
from celery_pglock.looks import looking
from celery_pglock.models import BlockedPGLock, PGActivity, PGLock
from celery_pglock.waiters import BLOCKED
from tests.bystanders import bystanders, waits
from tests.conftest import wait_until
from tests.models import Entry

pytestmark = pytest.mark.django_db(transaction=True)

SEVEN = "SELECT pg_advisory_lock(7)"
READS_LOCKS = "pg_lock_status"


@pytest.fixture
def session():
    with bystanders() as make:
        yield make


def nodes(plan):
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def reads_of_locks(sql, *parameters):
    """How often a statement reads pg_locks, told by PostgreSQL as it does."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", parameters)
        answer = cursor.fetchone()[0]
    plan = (json.loads(answer) if isinstance(answer, str) else answer)[0]["Plan"]
    return sum(node["Actual Loops"] for node in nodes(plan) if node.get("Function Name") == READS_LOCKS)


@pytest.mark.parametrize(
    "without", ["", "enable_nestloop", "enable_hashjoin", "enable_nestloop,enable_hashjoin"]
)
def test_while_nobody_waits_no_plan_for_blocked_locks_reads_the_locks(session, without):
    sql, parameters = BlockedPGLock.objects.select_related("activity").query.sql_with_params()
    session().does(SEVEN)
    with transaction.atomic(), connection.cursor() as cursor:
        for name in filter(None, without.split(",")):
            cursor.execute("SELECT set_config(%s, 'off', true)", [name])
        assert reads_of_locks(sql, *parameters) == 0
        session().waits(SEVEN)
        assert reads_of_locks(sql, *parameters) == 1


def test_who_is_blocked_by_whom_is_told_by_pids_without_a_look_at_the_locks(session):
    holder, first, second = session(), session(), session()
    holder.does(SEVEN)
    first.waits(SEVEN)
    second.waits(SEVEN)
    both = tuple(sorted([holder.pid, first.pid]))
    assert BlockedPGLock.objects.pids() == {first.pid: (holder.pid,), second.pid: both}
    assert reads_of_locks(BLOCKED) == 0


def test_waits_for_every_kind_of_lock_are_told_by_pids(session):
    Entry.objects.create(key="a", task_id="", what="")
    table, change = Entry._meta.db_table, f"UPDATE {Entry._meta.db_table} SET key = 'b'"
    holder, for_row, for_tuple, for_table = session(), session(), session(), session()
    holder.does("BEGIN", change)
    for_row.waits(change)
    for_tuple.waits(change)
    for_table.waits(f"BEGIN; LOCK TABLE {table}")
    found = BlockedPGLock.objects.pids()
    assert set(found) == {for_row.pid, for_tuple.pid, for_table.pid}
    assert {(pid, blocker) for pid, blockers in found.items() for blocker in blockers} == waits()


def test_whoever_waits_to_have_a_statement_described_waits_although_he_counts_as_idle(session):
    table = Entry._meta.db_table
    holder, waiter = session(), session()
    waiter.connection.pgconn.prepare(b"described", f"SELECT * FROM {table}".encode())
    holder.does("BEGIN", f"LOCK TABLE {table}")
    waiter.connection.pgconn.send_describe_prepared(b"described")
    wait_until(lambda: PGLock.objects.filter(activity_id=waiter.pid, wait_start__isnull=False), "it waits")
    assert PGActivity.objects.get(id=waiter.pid).state == "IDLE"
    assert waits() == {(waiter.pid, holder.pid)}
    assert BlockedPGLock.objects.pids() == {waiter.pid: (holder.pid,)}


def test_whoever_asks_is_not_told_as_a_blocker(session):
    with transaction.atomic():
        advisory("mine", xact=True).acquire()
        session().waits(f"SELECT pg_advisory_lock({key('mine').arguments[0]})")
        assert BlockedPGLock.objects.count() == 1
        assert BlockedPGLock.objects.pids() == {}


def test_a_transaction_that_looked_before_sees_who_waits_since_then(session):
    holder, waiter = session(), session()
    holder.does(SEVEN)
    with transaction.atomic():
        assert PGActivity.objects.filter(id=holder.pid).exists()
        assert waits() == set()
        waiter.waits(SEVEN)
        assert waits() == {(waiter.pid, holder.pid)}


def test_within_one_look_the_pids_are_told_anew_each_time(session):
    holder, waiter = session(), session()
    holder.does(SEVEN)
    with looking("default"):
        assert BlockedPGLock.objects.pids() == {}
        waiter.waits(SEVEN)
        assert BlockedPGLock.objects.pids() == {waiter.pid: (holder.pid,)}


@pytest.mark.parametrize(
    "chosen", [BlockedPGLock.objects.filter(type="ADVISORY"), BlockedPGLock.objects.all()[:3]]
)
def test_pids_of_some_waits_alone_are_refused(chosen):
    with pytest.raises(LockMisuse, match="cannot come after a filter"):
        chosen.pids()
