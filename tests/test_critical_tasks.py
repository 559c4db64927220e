"""Critical tasks get through: who is in their way is stopped, and comes back."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from celery import states
from django.core.management import call_command
from django.db import connection, connections
from django.test.utils import modify_settings

from celery_pglock import LockMisuse, Preempted, advisory, clearances, config, obstructions
from celery_pglock.bootsteps import PrioritizeCriticalTasks
from celery_pglock.checks import settings_can_work
from celery_pglock.config import Chosen
from celery_pglock.inquiries import listing
from celery_pglock.markers import marker
from celery_pglock.models import Act, BlockedPGLock, KeyState, LossCount, PGActivity, PGLock
from celery_pglock.tasks import prioritize_critical_tasks
from celery_pglock.testing import held_elsewhere
from tests.bystanders import bystanders
from tests.conftest import running_worker, wait_until
from tests.critical_tasks import (
    as_critical_holds,
    critical,
    critical_nested,
    critical_reader,
    critical_writer,
    holds,
    holds_in_a_transaction,
    holds_or_skips,
    more_critical,
    waits_its_turn,
)
from tests.models import Entry
from tests.servers import Cluster

TABLE = KeyState._meta.db_table
LOCK_TABLE = f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE"
READ_TABLE = f"SELECT count(*) FROM {TABLE}"


@pytest.fixture(scope="module")
def _children(django_db_setup, django_db_blocker):
    with (
        django_db_blocker.unblock(),
        running_worker("critical", concurrency=4, TASKS="critical_tasks") as worker,
    ):
        yield worker


@pytest.fixture
def send(_children, rival):
    """Sends a task to a prefork worker."""

    def send(task, *args):
        return task.apply_async(args, queue=_children.queue)

    send.worker = _children
    return send


@pytest.fixture
def somebody(transactional_db):
    """Makes sessions by the names of their tasks, critical or not."""
    with bystanders() as make:

        def one(name, priority=0, **options):
            found = make(application_name=name, **options)
            if priority:
                found.take(marker(priority), shared=True)
            return found

        yield one


@pytest.fixture
def a_row(transactional_db):
    """A row that somebody may lock."""
    return Entry.objects.create(key="row", task_id="", what="begins")


def clear(**options):
    return prioritize_critical_tasks(**{"min_wait": 0, "grace": 0, **options})


def begun(key, times=1):
    wait_until(lambda: Entry.objects.filter(key=key, what="begins").count() >= times, f"{key} begins")


def waiting(times=1):
    waits = BlockedPGLock.objects.filter(wait_start__isnull=False).values("activity_id").distinct()
    wait_until(lambda: waits.count() >= times, "waiting")


def reached(result, state):
    wait_until(lambda: result.state == state, f"{state}, not {result.state}")


def is_there(*found):
    return [PGActivity.objects.filter(pk=one.pid).exists() for one in found]


def who(entries):
    return [entry["who"] for entry in entries]


class TestInPrefork:
    # What only sleeps in a transaction, nobody can interrupt.
    @pytest.mark.parametrize(
        ("task", "way"),
        [(holds, "sleep"), (holds, "ask_postgresql"), (holds_in_a_transaction, "ask_postgresql")],
    )
    def test_a_task_that_holds_a_critical_key_is_stopped_and_comes_back(self, send, task, way):
        victim = send(task, "k", way)
        wait_until(lambda: sees_lock_on_key(victim))
        if way == "ask_postgresql":
            wait_until(lambda: is_asking())
        result = send(critical, "k")
        waiting()
        (stopped,) = clear()["stopped"]
        assert (stopped["task_id"], stopped["errors"]) == (victim.id, [])
        assert result.get(timeout=5) == "through"
        reached(victim, states.RETRY)
        assert isinstance(victim.result, Preempted)
        assert f"in the way of {critical.name} [{result.id}], which waits for ADVISORY" in str(victim.result)
        assert victim.get(timeout=10) == "done"
        for act in Act.objects.all():
            assert (act.through, act.by) == ("beat", prioritize_critical_tasks.name)
            assert (act.task_id, act.comes_back) == (victim.id, True)
            assert act.reason.startswith(f"in the way of {critical.name} [{result.id}]")

    def test_a_task_whose_transaction_holds_a_table_is_stopped_and_comes_back(self, send):
        victim = send(holds, "k", "lock_the_table")
        begun("k")
        wait_until(lambda: is_locking(victim))
        result = send(critical_reader)
        waiting()
        assert [one["task_id"] for one in clear()["stopped"]] == [victim.id]
        assert result.get(timeout=5) == 0
        reached(victim, states.RETRY)
        assert victim.get(timeout=10) == "done"

    def test_a_task_that_holds_a_key_which_a_critical_body_waits_for_is_stopped(self, send):
        victim = send(holds, "k")
        begun("k")
        result = send(critical_nested, "k")
        waiting()
        assert [one["task_id"] for one in clear()["stopped"]] == [victim.id]
        assert result.get(timeout=5) is True
        assert victim.get(timeout=10) == "done"

    def test_an_outsider_who_holds_a_row_is_spared_and_told(self, send, rival, a_row, caplog):
        rival.connection.execute("BEGIN; SELECT FROM tests_entry FOR UPDATE")
        result = send(critical_writer, "row")
        waiting()
        summary = clear()
        assert summary["stopped"] == []
        (spared,) = summary["spared"]
        assert "no filter of CELERY_PGLOCK['VICTIMS'] finds it: application_name=" in spared["reason"]
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert not Act.objects.exists()
        rival.connection.execute("ROLLBACK")
        assert result.get(timeout=5) == 1

    def test_an_outsider_who_holds_a_row_is_stopped_where_that_is_allowed(
        self, send, somebody, a_row, pglock_settings
    ):
        pglock_settings(VICTIMS=["application_name=report", "application_name__startswith=celery:"])
        report = somebody("report")
        report.does("BEGIN", "SELECT FROM tests_entry FOR UPDATE")
        result = send(critical_writer, "row")
        waiting()
        (stopped,) = clear()["stopped"]
        assert stopped["tries"] == [{"action": "terminate", "pid": report.pid, "outcome": "terminated"}]
        assert result.get(timeout=5) == 1
        assert Act.objects.get().comes_back is None

    def test_without_requeue_the_task_fails(self, send):
        victim = send(holds, "k")
        begun("k")
        result = send(critical, "k")
        waiting()
        clear(requeue=False)
        assert result.get(timeout=5) == "through"
        with pytest.raises(Preempted, match="in the way of"):
            victim.get(timeout=5)
        assert victim.state == states.FAILURE
        assert set(Act.objects.values_list("comes_back", flat=True)) == {False}

    def test_a_task_that_would_be_skipped_comes_back_instead(self, send):
        victim = send(holds_or_skips, "k")
        begun("k")
        result = send(critical, "k", 2.5)
        waiting()
        clear()
        assert victim.get(timeout=15) == "done"
        assert result.get(timeout=5) == "through"

    def test_a_task_that_only_waits_ahead_comes_back_too(self, send, rival):
        rival.take("k", shared=True)
        ahead = send(waits_its_turn, "k")
        waiting()
        result = send(critical, "k")
        waiting(2)
        assert [one["task_id"] for one in clear()["stopped"]] == [ahead.id]
        rival.give_back("k", shared=True)
        assert result.get(timeout=5) == "through"
        assert ahead.get(timeout=10) == "done"

    def test_whoever_goes_on_after_the_cancelling_is_terminated_when_the_grace_is_over(self, send):
        victim = send(holds, "k", "ignore_errors")
        begun("k")
        result = send(critical, "k")
        waiting()
        (stopped,) = clear(grace=1)["stopped"]
        outcomes = [(one["action"], one["outcome"]) for one in stopped["tries"]]
        assert outcomes[0] == ("cancel", "cancelled")
        assert ("terminate", "terminated") in outcomes
        assert result.get(timeout=5) == "through"
        assert victim.get(timeout=10) == "done"

    def test_a_task_that_is_as_critical_is_left_alone(self, send):
        victim = send(as_critical_holds, "k")
        begun("k")
        waiter = send(critical, "k")
        waiting()
        summary = clear()
        assert summary["stopped"] == []
        assert summary["spared"][0]["reason"] == "it is as critical: its priority is 5"
        assert victim.state == states.STARTED
        result = send(more_critical, "k")
        waiting(2)
        assert victim.id in [one["task_id"] for one in clear()["stopped"]]
        assert result.get(timeout=5) == "through"
        assert waiter.get(timeout=5) == "through"
        assert victim.get(timeout=15) == "done"

    def test_the_work_connection_of_a_task_that_is_as_critical_is_left_alone(self, send):
        victim = send(as_critical_holds, "k", "lock_the_table")
        begun("k")
        wait_until(lambda: is_locking(victim))
        result = send(critical_reader)
        waiting()
        summary = clear()
        assert (summary["stopped"], len(summary["spared"])) == ([], 1)
        assert not Act.objects.exists()
        (work,) = PGActivity.objects.filter(application_name=f"celery:{victim.id}").terminate()
        assert work.is_done
        assert result.get(timeout=5) == 0
        victim.revoke(terminate=True)

    def test_a_loss_is_counted_although_the_work_connection_has_ended_too(self, send):
        victim = send(holds, "k")
        begun("k")
        result = send(critical, "k")
        waiting()
        clear()
        assert result.get(timeout=5) == "through"
        assert victim.get(timeout=10) == "done"
        assert LossCount.objects.get().key == "k"
        assert "Error calling count_loss" not in send.worker.log


def sees_lock_on_key(result):
    return PGLock.objects.filter(task_id=result.id, type="ADVISORY", granted=True).exists()


def is_asking():
    return PGActivity.objects.filter(query__startswith="SELECT pg_sleep", state="ACTIVE").exists()


def is_locking(result):
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) WHERE a.application_name = %s"
            " AND relation = to_regclass(%s) AND mode = 'AccessExclusiveLock' AND granted",
            [f"celery:{result.id}", TABLE],
        )
        return bool(cursor.fetchall())


class TestWhoIsStopped:
    def test_a_dry_run_touches_nothing(self, somebody, caplog):
        caplog.set_level(logging.INFO, "celery_pglock")
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        summary = clear(dry_run=True)
        assert who(summary["would_stop"]) == ["task [b]"]
        assert summary["would_stop"][0]["tries"] == []
        assert is_there(blocker, waiter) == [True, True]
        assert not Act.objects.exists()
        assert "Would stop task [b], in the way of task [c], which waits for ADVISORY" in caplog.text
        assert json.loads(json.dumps(summary)) == summary

    def test_nobody_is_stopped_for_a_wait_that_is_shorter(self, somebody):
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        assert clear(min_wait=60)["critical"] == []
        assert clear(min_wait=timedelta(minutes=1))["stopped"] == []
        assert is_there(blocker) == [True]
        assert len(wait_until(lambda: clear(min_wait=0.01)["stopped"])) == 1
        assert is_there(blocker) == [False]

    def test_nobody_is_stopped_for_a_task_that_is_not_critical(self, somebody):
        blocker, waiter = somebody("celery:b"), somebody("celery:c")
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        somebody("celery:d", 9)
        assert clear() == {"dry_run": False, "critical": [], "stopped": [], "spared": [], "left": []}
        assert is_there(blocker) == [True]

    def test_no_more_than_so_many_are_stopped_in_one_run(self, somebody, caplog):
        blockers = [somebody(f"celery:{number}") for number in range(3)]
        for blocker in blockers:
            blocker.take(7, shared=True)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        summary = clear(max_victims=2)
        assert (len(summary["stopped"]), len(summary["left"])) == (2, 1)
        assert sum(is_there(*blockers)) == 1
        assert "1 more" in caplog.text
        assert len(clear(max_victims=2)["stopped"]) == 1
        assert sum(is_there(*blockers)) == 0

    def test_a_task_with_two_sessions_is_one_victim(self, somebody):
        work, lock, other = somebody("celery:b"), somebody("pglock:b"), somebody("celery:other")
        lock.take(7)
        work.take(8)
        other.take(9)
        for number in (7, 8, 9):
            somebody(f"celery:c{number}", 1).waits(f"SELECT pg_advisory_lock({number})")
        summary = clear(max_victims=2)
        assert sorted(who(summary["stopped"])) == ["task [b]", "task [other]"]
        assert summary["left"] == []

    @pytest.mark.parametrize("which", ["work", "lock"])
    def test_all_sessions_of_a_task_end_the_work_before_the_lock(self, somebody, which):
        lock, work = somebody("pglock:b"), somebody("celery:b")
        {"work": work, "lock": lock}[which].take(7)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        clear()
        assert is_there(work, lock) == [False, False]
        acts = Act.objects.order_by("pk").values_list("pid", "action", "outcome__outcome")
        assert list(acts) == [(work.pid, "terminate", "terminated"), (lock.pid, "terminate", "terminated")]

    def test_only_what_runs_is_cancelled(self, somebody):
        lock, work = somebody("pglock:b"), somebody("celery:b")
        lock.take(7)
        work.sends("SELECT pg_sleep(60)")
        wait_until(lambda: PGActivity.objects.get(pk=work.pid).state == "ACTIVE")
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        clear()
        assert list(Act.objects.filter(action="cancel").values_list("pid", flat=True)) == [work.pid]

    def test_whoever_makes_way_within_the_grace_is_not_terminated(self, somebody):
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        leaving = threading.Timer(0.7, lambda: blocker.give_back(7))
        leaving.start()
        (one,) = clear(grace=20)["stopped"]
        leaving.join()
        assert one["tries"] == []
        assert is_there(blocker) == [True]

    def test_the_grace_is_no_longer_than_asked_for(self, somebody):
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        began = time.monotonic()
        clear(grace=1)
        assert 1 <= time.monotonic() - began < 4
        assert is_there(blocker) == [False]

    def test_a_higher_priority_of_any_session_of_the_task_spares_all(self, somebody):
        work, lock, waiter = somebody("celery:b", 5), somebody("pglock:b"), somebody("celery:c", 4)
        lock.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        summary = clear()
        assert [one["who"] for one in summary["spared"]] == ["task [b]"]
        assert is_there(work, lock) == [True, True]

    def test_a_higher_priority_of_any_session_of_the_waiter_counts(self, somebody):
        blocker, lock = somebody("celery:b", 9), somebody("pglock:c")
        for priority in (2, 10, 3, 4, 5, 6, 7, 8):
            somebody("celery:c", priority)
        lock.take(marker(1), shared=True)
        blocker.take(7)
        lock.waits("SELECT pg_advisory_lock(7)")
        assert who(clear()["stopped"]) == ["task [b]"]

    def test_whatever_the_settings_say_nobody_as_critical_is_stopped(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=None)
        blocker, waiter = somebody("somebody", 2), somebody("celery:c", 2)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        assert clear()["stopped"] == []
        assert is_there(blocker) == [True]

    def test_only_those_whom_the_settings_name_are_stopped(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=("application_name=one", "application_name__endswith=wo"))
        names = ("one", "two", "celery:b")
        blockers = [somebody(name) for name in names]
        for blocker in blockers:
            blocker.take(7, shared=True)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        clear()
        assert is_there(*blockers) == [False, False, True]

    def test_an_empty_list_names_nobody(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=[])
        blocker = somebody("celery:b")
        blocker.take(7)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        assert clear()["stopped"] == []

    def test_none_names_everybody(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=None)
        blocker = somebody("")
        blocker.take(7)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        assert len(clear()["stopped"]) == 1
        assert is_there(blocker) == [False]

    def test_maintenance_is_spared(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=None)
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_get_viewdef('celery_pglock_pgactivity'::regclass)")
            view = cursor.fetchone()[0]
            change = re.sub(r"replace\([a-z_.]*backend_type,", "replace('autovacuum worker',", view)
            assert change != view
            cursor.execute(f"CREATE OR REPLACE VIEW celery_pglock_pgactivity AS {change}")
            try:
                summary = clear()
            finally:
                cursor.execute(f"CREATE OR REPLACE VIEW celery_pglock_pgactivity AS {view}")
        assert summary["spared"][0]["reason"] == "it is PostgreSQL's own: AUTOVACUUM_WORKER"
        assert is_there(blocker) == [True]

    def test_those_who_hold_come_before_those_who_only_wait_ahead(self, somebody):
        ahead, holder, waiter = somebody("celery:a"), somebody("celery:z"), somebody("celery:c", 1)
        holder.take(7)
        ahead.waits("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        summary = clear(max_victims=1)
        assert (who(summary["stopped"]), who(summary["left"])) == (["task [z]"], ["task [a]"])

    def test_one_who_holds_and_waits_for_more_of_it_comes_first_too(self, somebody):
        ahead, holder, waiter = somebody("celery:a"), somebody("celery:z"), somebody("celery:c", 1)
        for one in (holder, somebody("celery:y", 1)):
            one.take(7, shared=True)
        holder.waits("SELECT pg_advisory_lock(7)")
        ahead.waits("SELECT pg_advisory_lock(7)")
        waiter.waits("SELECT pg_advisory_lock(7)")
        summary = clear(max_victims=1)
        assert (who(summary["stopped"]), who(summary["left"])) == (["task [z]"], ["task [a]"])

    def test_the_way_of_the_most_critical_is_cleared_first_and_then_of_the_longest_waiting(self, somebody):
        for number, priority in ((1, 1), (2, 1), (3, 9)):
            somebody(f"celery:b{number}").take(number)
            somebody(f"celery:c{number}", priority).waits(f"SELECT pg_advisory_lock({number})")
        summary = clear(max_victims=1)
        assert who(summary["stopped"] + summary["left"]) == ["task [b3]", "task [b1]", "task [b2]"]

    def test_the_next_task_of_a_session_is_not_stopped(self, somebody):
        work, lock, waiter = somebody("celery:b"), somebody("pglock:b"), somebody("celery:c", 1)
        lock.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        work.sends("SELECT pg_sleep(0.5)")
        wait_until(is_asking)
        found = obstructions.look("default", 0)
        work.answers()
        for one, name in ((work, "celery:next"), (lock, "pglock:next")):
            one.does(f"SET application_name = '{name}'")
        work.sends("SELECT pg_sleep(60)")
        wait_until(is_asking)
        (treatment,) = clearances.stop(found.blockers, terms())
        assert [(one.action, one.stop.outcome) for one in treatment.tries] == [("cancel", "gone")]
        assert work.is_busy
        assert is_there(work, lock) == [True, True]

    def test_of_two_sessions_the_one_that_is_another_tasks_by_now_is_not_stopped(self, somebody):
        work, lock, waiter = somebody("celery:b"), somebody("pglock:b"), somebody("celery:c", 1)
        lock.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        found = obstructions.look("default", 0)
        work.does("SET application_name = 'celery:next'")
        clearances.stop(found.blockers, terms())
        assert is_there(work, lock) == [True, False]

    def test_whoever_looks_spares_himself(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=None)
        with advisory(7), connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(8)")
            for number in (7, 8):
                somebody(f"celery:c{number}", 1).waits(f"SELECT pg_advisory_lock({number})")
            summary = clear()
            cursor.execute("SELECT pg_advisory_unlock(8)")
        assert summary["stopped"] == []
        assert [one["reason"] for one in summary["spared"]] == [
            "it is a session of whoever clears the way"
        ] * 2

    def test_whoever_is_in_another_database_is_spared(self, somebody, pglock_settings):
        pglock_settings(VICTIMS=None)
        stranger, waiter = somebody("celery:b", dbname="postgres"), somebody("celery:c", 1)
        # Of the whole server, and read by nobody else: other tests go on.
        stranger.does("BEGIN", "LOCK TABLE pg_replication_origin IN ACCESS EXCLUSIVE MODE")
        waiter.waits("SELECT count(*) FROM pg_replication_origin")
        summary = clear()
        stranger.does("ROLLBACK")
        assert summary["stopped"] == []
        assert [one["reason"] for one in summary["spared"]] == ["it is not of this database, or has ended"]

    def test_a_task_that_is_out_of_the_way_is_not_stopped(self, somebody):
        work, lock, waiter = somebody("celery:b"), somebody("pglock:b"), somebody("celery:c", 1)
        lock.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        found = obstructions.look("default", 0)
        lock.give_back(7)
        waiter.answers()
        (treatment,) = clearances.stop(found.blockers, terms())
        assert not treatment.is_done
        assert is_there(work, lock) == [True, True]

    def test_without_an_audit_nobody_is_stopped_and_that_is_told(self, somebody, caplog):
        blocker, waiter = somebody("celery:b"), somebody("celery:c", 1)
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        keeper = somebody("keeper")
        keeper.does("BEGIN", f"LOCK TABLE {Act._meta.db_table} IN ACCESS EXCLUSIVE MODE")
        (one,) = clear()["stopped"]
        assert one["tries"] == []
        assert "lock timeout" in one["errors"][0]
        assert is_there(blocker) == [True]
        assert [record.levelname for record in caplog.records] == ["ERROR"]

    def test_whoever_may_be_out_of_the_way_is_asked_again_before_he_is_terminated(self, somebody, caplog):
        blocker, waiter, keeper = somebody("celery:b"), somebody("celery:c", 1), somebody("keeper")
        blocker.take(7)
        waiter.waits("SELECT pg_advisory_lock(7)")
        leaving = threading.Timer(1.6, lambda: keeper.does("ROLLBACK"))

        def pause(seconds):
            keeper.does("BEGIN", f"LOCK TABLE {BlockedPGLock._meta.db_table}")
            leaving.start()
            time.sleep(seconds)

        summary = terms(grace=1).clear(pause)
        leaving.join()
        assert "Who is in the way still could not be read" in caplog.text
        assert summary["stopped"][0]["errors"] == []
        assert is_there(blocker) == [False]

    def test_one_failure_does_not_stop_the_rest(self, somebody):
        first, second = somebody("celery:a"), somebody("celery:b")
        first.take(7)
        second.take(8)
        somebody("celery:c", 2).waits("SELECT pg_advisory_lock(7)")
        somebody("celery:d", 1).waits("SELECT pg_advisory_lock(8)")
        with connection.cursor() as cursor:
            cursor.execute(
                f"ALTER TABLE {Act._meta.db_table} ADD CONSTRAINT no CHECK (pid <> {first.pid}) NOT VALID"
            )
            try:
                one, other = clear()["stopped"]
            finally:
                cursor.execute(f"ALTER TABLE {Act._meta.db_table} DROP CONSTRAINT no")
        assert (one["task_id"], len(one["errors"])) == ("a", 1)
        assert (other["task_id"], other["errors"]) == ("b", [])
        assert is_there(first, second) == [True, False]

    def test_of_a_role_with_no_more_rights_its_own_are_stopped_and_others_told(self, somebody, rival):
        blocker = somebody("celery:mine", role="critical_ordinary") if has_role(rival) else None
        stranger = somebody("celery:stranger")
        waiter = somebody("celery:c", 1, role="critical_ordinary")
        blocker.take(7, shared=True)
        stranger.take(7, shared=True)
        waiter.waits("SELECT pg_advisory_lock(7)")
        with as_role("critical_ordinary"):
            summary = clear()
        assert [one["task_id"] for one in summary["stopped"]] == ["mine"]
        assert "this role may not" in summary["spared"][0]["reason"]
        assert is_there(blocker, stranger) == [False, True]

    @pytest.mark.parametrize("may_signal", [False, True])
    def test_whom_a_role_may_read_and_not_stop_takes_nobodys_turn(self, somebody, rival, caplog, may_signal):
        has_role(rival)
        rival.connection.execute("GRANT pg_read_all_stats TO critical_ordinary")
        if may_signal:
            rival.connection.execute("GRANT pg_signal_backend TO critical_ordinary")
        stranger, mine = somebody("celery:a"), somebody("celery:b", role="critical_ordinary")
        for number, blocker in ((7, stranger), (8, mine)):
            blocker.take(number)
            somebody(f"celery:c{number}", 10 - number).waits(f"SELECT pg_advisory_lock({number})")
        with as_role("critical_ordinary"):
            summary = clear(max_victims=1)
        assert [one["task_id"] for one in summary["stopped"]] == ["b"]
        assert "this role may not" in summary["spared"][0]["reason"]
        assert is_there(stranger, mine) == [True, False]
        assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]

    def test_a_role_that_may_signal_stops_others(self, somebody, rival):
        has_role(rival)
        rival.connection.execute("GRANT pg_read_all_stats, pg_signal_backend TO critical_ordinary")
        rival.connection.execute("DROP ROLE IF EXISTS critical_other")
        rival.connection.execute("CREATE ROLE critical_other LOGIN")
        other = somebody("celery:b", role="critical_other")
        other.take(7)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        with as_role("critical_ordinary"):
            assert [one["task_id"] for one in clear()["stopped"]] == ["b"]
        assert is_there(other) == [False]

    @pytest.mark.django_db(transaction=True, databases=["default", "locks"])
    def test_one_runner_at_a_time_looks_after_an_alias(self, somebody):
        blocker = somebody("celery:b")
        blocker.take(7)
        somebody("celery:c", 1).waits("SELECT pg_advisory_lock(7)")
        with held_elsewhere(f"{prioritize_critical_tasks.name}(using=default)"):
            assert clear() is None
            assert clear(using="default") is None
            assert clear(using="locks") is not None

    def test_nothing_is_logged_when_nobody_waits(self, transactional_db, caplog):
        caplog.set_level(logging.INFO, "celery_pglock")
        clear()
        assert caplog.text == ""


def test_a_transaction_that_was_prepared_is_told(monkeypatch, django_db_blocker):
    from example_project import servers

    monkeypatch.setitem(servers.POSTGRESQL_SETTINGS, "max_prepared_transactions", "2")
    locks = connections["locks"]
    with Cluster() as cluster, django_db_blocker.unblock():
        here = {"HOST": "127.0.0.1", "PORT": str(cluster.port), "NAME": "postgres", "USER": "postgres"}
        locks.close()
        for name, value in here.items():
            monkeypatch.setitem(locks.settings_dict, name, value)
        try:
            call_command("migrate", "celery_pglock", database="locks", verbosity=0)
            with bystanders("locks") as make:
                waiter, blocker = make(application_name="celery:c"), make(application_name="celery:b")
                waiter.take(marker(1), shared=True)
                blocker.does("BEGIN", LOCK_TABLE, "PREPARE TRANSACTION 'critical'")
                waiter.waits(READ_TABLE)
                summary = terms(using="locks").clear()
                blocker.does("ROLLBACK PREPARED 'critical'")
        finally:
            locks.close()
    assert (summary["stopped"], summary["spared"][0]["pid"]) == ([], None)
    assert summary["spared"][0]["who"] == "a transaction that was prepared (see pg_prepared_xacts)"
    assert summary["spared"][0]["reason"] == "it has no backend"


def terms(**options):
    given = {"dry_run": False, "min_wait": 0, "grace": 0, "max_victims": 5, "requeue": True, "using": None}
    return clearances.terms(**(given | options))


def has_role(rival):
    rival.connection.execute("DROP ROLE IF EXISTS critical_ordinary")
    rival.connection.execute("CREATE ROLE critical_ordinary LOGIN")
    return True


@contextmanager
def as_role(role):
    """Our tables need rights, as those of any app do."""
    with connection.cursor() as cursor:
        cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        cursor.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    before = connection.settings_dict["OPTIONS"]
    connection.close()
    connection.settings_dict["OPTIONS"] = {**before, "assume_role": role}
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"] = before
        with connection.cursor() as cursor:
            cursor.execute(f"DROP OWNED BY {role}")


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_wait": -1}, r"prioritize_critical_tasks\(min_wait=...\) must be 0 or more"),
            ({"min_wait": None}, r"min_wait=...\) must be a number of seconds"),
            ({"grace": "5"}, r"grace=...\) must be a number of seconds"),
            ({"grace": float("inf")}, r"grace=...\) must be a number of seconds"),
            ({"max_victims": 0}, "1 or more, not 0; to stop nobody use dry_run=True"),
            ({"max_victims": True}, "1 or more"),
            ({"max_victims": 1.5}, "1 or more"),
            ({"requeue": None}, "True or False"),
            ({"dry_run": "no"}, "True or False"),
            ({"using": "lock"}, r"using=...\) names 'lock', .* Did you mean 'locks'"),
        ],
    )
    def test_an_argument_that_cannot_be_meant(self, options, message, transactional_db):
        with pytest.raises(LockMisuse, match=message):
            clear(**options)

    @pytest.mark.parametrize(
        ("victims", "message"),
        [
            ("application_name=x", "must be a list of filters"),
            ([1], "must be a list of filters"),
            (["application=x"], "VICTIMS'].*application=x.*Did you mean 'application_name'"),
            (["application_name__startwith=x"], "VICTIMS'].*cannot be used"),
            (["application_name"], "LOOKUP=VALUE"),
        ],
    )
    def test_a_list_of_victims_that_cannot_be_used(self, victims, message, pglock_settings):
        pglock_settings(VICTIMS=victims)
        with pytest.raises(LockMisuse, match=message):
            terms()
        assert [found.id for found in settings_can_work()] == ["celery_pglock.E001"]

    def test_whoever_is_no_task_of_ours_is_no_victim_by_default(self):
        assert config.current().VICTIMS == (
            "application_name__startswith=celery:",
            "application_name__startswith=pglock:",
        )

    def test_a_project_without_the_app_is_told_what_is_missing(self, transactional_db):
        with (
            modify_settings(INSTALLED_APPS={"remove": "celery_pglock"}),
            pytest.raises(LockMisuse, match="INSTALLED_APPS"),
        ):
            clear()

    def test_its_door_opens_without_the_app(self):
        code = "import django; from django.conf import settings; settings.configure(); django.setup()"
        code += "; from celery_pglock.tasks import prioritize_critical_tasks; import celery_pglock.bootsteps"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_project_whose_own_tasks_need_no_lock_session_is_not_asked_for_one(self):
        code = "import django; django.setup(); from celery import Celery; import celery_pglock.tasks"
        code += "; from celery_pglock.task_options import session_level_aliases"
        code += "; assert session_level_aliases(Celery('project')) == {}"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_markers_are_not_listed_unless_they_are_asked_for(somebody):
    one = somebody("celery:c", 3)
    chosen = Chosen(database="default", attributes=("activity_id", "objid"))
    assert listing(chosen).rows == []
    asked = Chosen(database="default", attributes=("objid",), pids=(one.pid,), filters=("type=ADVISORY",))
    assert listing(asked).rows == [[3]]


@contextmanager
def running_beat(tmp_path):
    with (tmp_path / "beat.log").open("wb") as log:
        command = [sys.executable, "-m", "celery", "-A", "tests.celery_app", "beat", "-l", "INFO"]
        beat = subprocess.Popen(
            [*command, "-s", str(tmp_path / "schedule"), "--pidfile="],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                "TASKS": "critical_tasks",
                "TEST_DATABASE_NAME": connection.settings_dict["NAME"],
            },
        )
        try:
            yield
        finally:
            beat.kill()
            beat.wait()


def test_all_slots_full_of_blocked_critical_tasks_are_freed_by_beat_and_a_queue_of_its_own(rival, tmp_path):
    with (
        running_worker("main", concurrency=3, TASKS="critical_tasks"),
        running_worker("critical-own-queue", concurrency=1, TASKS="critical_tasks") as own,
    ):
        victim = holds.apply_async(["k", "lock_the_table"], queue="main")
        begun("k")
        wait_until(lambda: is_locking(victim))
        blocked = [critical_reader.apply_async(queue="main") for _ in range(4)]
        waiting(2)
        with running_beat(tmp_path):
            assert [result.get(timeout=20) for result in blocked] == [0] * 4
        assert victim.get(timeout=10) == "done"
        assert set(Act.objects.values_list("through", flat=True)) == {"beat"}
        assert f"in the way of {critical_reader.name}" in own.log


@contextmanager
def running_bootstep(**options):
    with running_worker("lone", TASKS="critical_tasks", BOOTSTEP="1", **options) as worker:
        yield worker


def ends_in_time(worker):
    worker.process.send_signal(signal.SIGTERM)
    # By itself a worker of gevent takes more than four seconds.
    return worker.process.wait(15) == 0


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_all_slots_full_of_blocked_critical_tasks_are_freed_by_a_bootstep(rival, pool):
    with running_bootstep(pool=pool, concurrency=2) as worker:
        victim = holds.apply_async(["k", "ask_postgresql"], queue="lone")
        begun("k")
        blocked = [critical.apply_async(["k"], queue="lone") for _ in range(3)]
        assert [result.get(timeout=15) for result in blocked] == ["through"] * 3
        assert victim.get(timeout=10) == "done"
        assert set(Act.objects.values_list("through", "by")) == {("bootstep", prioritize_critical_tasks.name)}
        assert ends_in_time(worker)


def test_a_worker_whose_only_thread_is_blocked_frees_itself_by_a_bootstep(somebody):
    blocker = somebody("celery:elsewhere")
    blocker.take("k")
    with running_bootstep(pool="solo") as worker:
        assert critical.apply_async(["k"], queue="lone").get(timeout=15) == "through"
        assert is_there(blocker) == [False]
        assert ends_in_time(worker)


def test_a_bootstep_is_there_again_when_postgresql_is(somebody):
    blocker = somebody("celery:elsewhere")
    blocker.take("k")
    with running_bootstep(MIN_WAIT="4") as worker, psycopg.connect(**elsewhere(), autocommit=True) as boss:
        result = critical.apply_async(["k"], queue="lone")
        waiting()
        name = connection.settings_dict["NAME"]
        boss.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            wait_until(lambda: "is not cleared this time" in worker.log)
        finally:
            boss.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        assert result.get(timeout=15) == "through"
        assert "Traceback" not in worker.log


def elsewhere():
    parameters = {**connection.get_connection_params(), "dbname": "postgres"}
    return {name: parameters[name] for name in ("host", "port", "user", "dbname")}


def test_children_that_are_forked_while_a_bootstep_looks_do_it_no_harm(somebody):
    with running_bootstep(concurrency=2, INTERVAL="0.01", TASKS_PER_CHILD="1") as worker:
        results = [critical.apply_async([f"{number}"], queue="lone") for number in range(5)]
        assert [result.get(timeout=20) for result in results] == ["through"] * 5
        blocker = somebody("celery:elsewhere")
        blocker.take("k")
        assert critical.apply_async(["k"], queue="lone").get(timeout=15) == "through"
        assert "Traceback" not in worker.log


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"INTERVAL": "0"}, "EverySecond: interval must be more than 0 seconds"),
        ({"MAX_VICTIMS": "0"}, "max_victims=...) must be an int of 1 or more, not 0"),
        ({"PGLOCK_SETTINGS": '{"VICTIMS": ["name=x"]}'}, "VICTIMS"),
    ],
)
def test_a_bootstep_that_cannot_work_keeps_its_worker_from_starting(transactional_db, variables, message):
    with pytest.raises(AssertionError) as refused, running_bootstep(**variables):
        pass
    assert "exit code 1" in str(refused.value)
    assert message in str(refused.value)
    assert "Traceback" not in str(refused.value)


def test_an_option_that_a_bootstep_does_not_have_is_refused_with_a_guess():
    class Misspelt(PrioritizeCriticalTasks):
        intervall = 5

    with pytest.raises(SystemExit, match=r"no option 'intervall'\. Did you mean 'interval'"):
        Misspelt(None)


def test_a_bootstep_without_its_tables_names_the_command_and_has_no_traceback(rival):
    rival.connection.execute("ALTER VIEW celery_pglock_wait RENAME TO elsewhere")
    try:
        with running_bootstep() as worker:
            wait_until(lambda: "run manage.py migrate celery_pglock" in worker.log)
            assert "Looking every 1 s after critical tasks on alias 'default'" in worker.log
            assert "Traceback" not in worker.log
    finally:
        rival.connection.execute("ALTER VIEW elsewhere RENAME TO celery_pglock_wait")
