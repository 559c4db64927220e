"""What the models tell in random situations, and what PostgreSQL's own views tell by another query."""

import os

import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_pglock.models import BlockedPGLock, PGLock
from tests.bystanders import bystanders
from tests.conftest import wait_until
from tests.models import Entry

# How many situations; `SITUATIONS=5000 make test ARGS='-k differential'` takes its time.
SITUATIONS = int(os.environ.get("SITUATIONS", "120"))

TABLE = Entry._meta.db_table
SESSIONS = 5
MODES = [
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
]
STATEMENTS = [
    *(
        f"SELECT pg_advisory{xact}_lock{shared}({key})"
        for xact in ("", "_xact")
        for shared in ("", "_shared")
        for key in ("1", "2", "1, 2", "-1")
    ),
    *(f"LOCK TABLE {TABLE} IN {mode} MODE" for mode in MODES),
    *(
        f"SELECT FROM {TABLE} WHERE id = {number} FOR {how}"
        for number in (1, 2)
        for how in ("UPDATE", "SHARE")
    ),
    *(f"UPDATE {TABLE} SET key = key || 'x' WHERE id = {number}" for number in (1, 2)),
    f"INSERT INTO {TABLE} (id, key, task_id, what) VALUES (3, '', '', '')",
    "SELECT pg_advisory_unlock_all()",
    "ROLLBACK",
]
STEPS = st.lists(
    st.tuples(st.integers(0, SESSIONS - 1), st.sampled_from(STATEMENTS)), min_size=4, max_size=16
)

# Without to_regclass, regular expressions, joins with pg_class, or the views of ours.
TRUTH = """
SELECT upper(l.locktype), l.pid, l.granted, l.mode, l.relation::bigint, l.classid::bigint, l.objid::bigint,
       l.objsubid::int, l.relation::regclass::text
FROM pg_locks l
WHERE l.pid IN (SELECT pid FROM pg_stat_activity WHERE datid = (
    SELECT oid FROM pg_database WHERE datname = current_database()
)) AND l.pid = ANY(%s)
"""
BLOCKERS = "SELECT w.pid, unnest(pg_blocking_pids(w.pid)) FROM unnest(%s::int[]) AS w(pid)"


def asked(sql, pids):
    with connection.cursor() as cursor:
        cursor.execute(sql, [pids])
        return cursor.fetchall()


def camel(mode):
    return "".join(word.capitalize() for word in mode.split("_")).replace("Siread", "SIRead") + "Lock"


def told(pids):
    fields = (
        "type",
        "activity_id",
        "granted",
        "mode",
        "relation",
        "classid",
        "objid",
        "objsubid",
        "rel_name",
        "id",
    )
    locks = list(PGLock.objects.pid(*pids).values_list(*fields))
    waits = list(BlockedPGLock.objects.pid(*pids).values_list("activity_id", "blocking_activity_id", "id"))
    return locks, waits


def situation(pids):
    """All that PostgreSQL tells by itself, twice the same."""
    return sorted(map(str, asked(TRUTH, pids))), sorted(asked(BLOCKERS, pids))


def settled(sessions, pids):
    """Everybody has his answer, or waits for a lock."""
    waiting = {row[1] for row in asked(TRUTH, pids) if not row[2]}
    return all(not one.is_busy or one.pid in waiting for one in sessions)


def compare(sessions, pids):
    while True:
        wait_until(lambda: settled(sessions, pids))
        before = situation(pids)
        truth = asked(TRUTH, pids)
        locks, waits = told(pids)
        blockers = asked(BLOCKERS, pids)
        if situation(pids) == before:
            break
    assert len({row[-1] for row in locks}) == len(locks)
    assert len({row[-1] for row in waits}) == len(waits)
    assert {row[:2] for row in waits} == set(blockers)
    assert len(waits) == len(set(blockers))
    waits_for_rows = {row[1] for row in truth if row[0] == "TRANSACTIONID" and not row[2]}
    assert sorted(
        str((kind, pid, granted, camel(mode), None if is_row(kind, granted) else relation, *numbers))
        for kind, pid, granted, mode, relation, *numbers, _, _ in locks
    ) == sorted(str(row[:8]) for row in truth)
    for kind, pid, granted, _, relation, *_, rel_name, _ in locks:
        if is_row(kind, granted) and pid in waits_for_rows and relation is not None:
            assert rel_name == TABLE
        elif relation is not None:
            assert next(row[8] for row in truth if row[4] == relation).endswith(rel_name)
    return len(waits)


def is_row(kind, granted):
    return kind == "TRANSACTIONID" and not granted


@pytest.mark.django_db(transaction=True)
def test_the_models_tell_what_postgresql_tells():
    seen = []

    @settings(
        max_examples=SITUATIONS,
        deadline=None,
        database=None,
        derandomize="SITUATIONS" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(STEPS)
    def situations(steps):
        for who, statement in steps:
            somebody = everybody[who]
            if somebody.is_busy:
                continue
            somebody.answers()
            if somebody.has_failed:
                somebody.does("ROLLBACK")
            if not somebody.in_transaction:
                somebody.does("BEGIN")
            somebody.sends(statement)
            wait_until(lambda: settled(everybody, pids))
        try:
            seen.append(compare(everybody, pids))
        finally:
            release(everybody)

    with bystanders() as make:
        everybody = [make() for _ in range(SESSIONS)]
        pids = [one.pid for one in everybody]
        Entry.objects.bulk_create(Entry(id=number, key="", task_id="", what="") for number in (1, 2))
        situations()
    assert sum(map(bool, seen)) > len(seen) / 4, "the situations have too few waits"


def release(sessions):
    for one in sessions:
        if one.is_busy:
            one.connection.cancel_safe()
    for one in sessions:
        one.answers()
        one.does("ROLLBACK", "SELECT pg_advisory_unlock_all()")
