"""What a full lock table does to who wants a lock, and that it does no more than that."""

import psycopg
import pytest
from celery import Celery, states
from django.core import mail
from django.db import OperationalError, connections

from celery_pglock import AdvisoryTask, advisory
from celery_pglock.keys import key
from celery_pglock.pool import pool
from tests.servers import Cluster

FULL = "out of shared memory"
FILL = """
DO $$ BEGIN
    FOR number IN 1..1000000 LOOP
        PERFORM pg_advisory_lock(1, number);
    END LOOP;
EXCEPTION WHEN out_of_memory THEN
    NULL;
END $$
"""


@pytest.fixture(scope="module")
def cluster(django_db_setup, django_db_blocker):
    settings = {"max_locks_per_transaction": "10", "max_connections": "20"}
    with Cluster(**settings) as cluster, django_db_blocker.unblock():
        here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
        connections.databases["small"] = {**connections.databases["default"], **here}
        yield cluster
        connections["small"].close()
        del connections["small"]
        del connections.databases["small"]


@pytest.fixture
def crammer(cluster, monkeypatch):
    """Has all the room there is, and gives it back when told to; what locks use is connected already."""
    # As outside of tests: idle sessions are kept for the next lock.
    monkeypatch.delattr(mail, "outbox", raising=False)
    with psycopg.connect(cluster.url, autocommit=True) as connection:
        yield connection
    pool().close_idle()
    connections["small"].close()


def held(crammer, objid=None):
    rows = crammer.execute("SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory'").fetchall()
    return len(rows) if objid is None else rows.count((objid,))


def fill(crammer):
    crammer.execute(FILL)


def empty(crammer):
    crammer.execute("SELECT pg_advisory_unlock_all()")


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": 1}, {"timeout": None}, {"limit": 3}, {"xact": True}]
)
def test_a_lock_for_which_there_is_no_room_is_djangos_operational_error_with_the_hint(crammer, options):
    lock = advisory("room", using="small", **options)
    with lock as acquired:
        assert acquired
    fill(crammer)
    with pytest.raises(OperationalError, match=FULL) as caught, lock:
        pytest.fail("the body ran")
    assert isinstance(caught.value.__cause__, psycopg.errors.OutOfMemory)
    assert "max_locks_per_transaction" in str(caught.value)
    empty(crammer)
    with lock as acquired:
        assert acquired
        assert held(crammer) == 1
    assert held(crammer) == 0


def test_of_several_keys_of_which_some_had_room_none_is_kept(crammer):
    fill(crammer)
    # Of so many one has room in the end, and the others have not.
    crammer.execute("SELECT pg_advisory_unlock(1, 1)")
    before = held(crammer)
    with pytest.raises(OperationalError, match=FULL), advisory(*range(200), using="small"):
        pytest.fail("the body ran")
    assert held(crammer) == before
    empty(crammer)
    assert held(crammer) == 0


def test_locks_that_are_held_already_are_given_back_where_there_is_no_room(crammer):
    with advisory("held", using="small"):
        fill(crammer)
        assert held(crammer, key("held").objid) == 1
    assert held(crammer, key("held").objid) == 0


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": 1}, {"limit": 3}])
@pytest.mark.parametrize("names", [["inner"], [f"inner {number}" for number in range(60)]], ids=len)
def test_a_lock_inside_of_which_there_is_no_room_for_another_stays_held(crammer, names, options):
    with advisory("outer", using="small"):
        fill(crammer)
        # So that some of many have room.
        crammer.execute("SELECT pg_advisory_unlock(1, number) FROM generate_series(1, 3) AS number")
        before = held(crammer)
        if len(names) == 1:
            fill(crammer)
        with pytest.raises(OperationalError, match=FULL), advisory(*names, using="small", **options):
            pytest.fail("the body ran")
        assert held(crammer, key("outer").objid) == 1
        assert len(names) == 1 or held(crammer) == before
        empty(crammer)
        with advisory(*names, using="small", **options) as acquired:
            assert acquired
            assert held(crammer) == 1 + len(names)
    assert held(crammer) == 0


def test_a_task_for_which_there_is_no_room_does_not_run(crammer):
    # The alias is there in these tests alone, and the tests' app binds the tasks of all.
    app = Celery("capacity", set_as_current=False)

    @app.task(base=AdvisoryTask, lock_key="room", lock_using="small", shared=False)
    def wants_room():
        return "done"

    assert wants_room.apply().get() == "done"
    fill(crammer)
    result = wants_room.apply()
    assert (result.state, FULL in str(result.result)) == (states.FAILURE, True)
    empty(crammer)
    assert wants_room.apply().get() == "done"
