"""What reports find, whom they ask, and what they wait for: nothing."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from celery import Celery
from django.utils import timezone

from celery_pglock import LockMisuse, labels, markers, reports, running_tasks, signals
from celery_pglock.keys import key
from celery_pglock.labels import Holding, Owner
from celery_pglock.models import KeyState, LockReport, LossCount, PGLock, SkipCount
from celery_pglock.reports import MOST_OF_ONE_KIND, Thresholds
from celery_pglock.task_options import session_level_aliases
from celery_pglock.tasks import report_locks
from celery_pglock.testing import held_elsewhere
from tests.bystanders import bystanders
from tests.celery_app import app
from tests.conftest import PATIENCE, running_worker, wait_until
from tests.models import Entry
from tests.test_command import as_ordinary_role
from tests.worker_tasks import skips

NEVER = Thresholds(None, None, 10**9)


@pytest.fixture
def session(transactional_db):
    with bystanders() as make:
        yield make


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "celery_pglock.tasks")
    return lambda: [(one.levelname, one.message) for one in caplog.records if "Locks of" in one.message]


pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "locks"])


def report(**arguments):
    """What the task gives, which runs here."""
    return report_locks.apply(kwargs=arguments).get()


def found(kind, **arguments):
    return [one for one in report(**arguments)["findings"] if one["kind"] == kind]


def holds(somebody, name, seconds=0.0, owner=None):
    """Make somebody hold the key, and say that he has for so long."""
    lock = key(name)
    comment = labels.comment(owner or Owner(), [Holding(lock, time.time() - seconds)], show_names=True)
    somebody.does(f"{comment} SELECT pg_advisory_lock({lock.arguments[0]})")
    return somebody.pid


def count(task_name, name, number, hours_ago=0, model=SkipCount):
    hour = timezone.now().replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours_ago)
    return model.objects.create(key=name, task_name=task_name, hour=hour, count=number)


# What is told


def test_a_lock_that_is_held_too_long_is_told(session, pglock_settings):
    pid = holds(session(), "report", 320, Owner("shop.tasks.bill", "some-id", "a-host"))
    (one,) = found("held_too_long")
    assert 320 <= one.pop("seconds") < 340
    assert one.pop("text").startswith(
        f"shop.tasks.bill [some-id] on a-host (backend {pid}) has held ADVISORY EXCLUSIVE 'report' for 0:05:2"
    )
    assert one == {
        "kind": "held_too_long",
        "pid": pid,
        "task_name": "shop.tasks.bill",
        "task_id": "some-id",
        "worker": "a-host",
        "lock": "ADVISORY EXCLUSIVE 'report'",
        "name": "report",
        "mode": "EXCLUSIVE",
    }
    assert not found("held_too_long", held_after=400)
    pglock_settings(HELD_AFTER=timedelta(seconds=400))
    assert not found("held_too_long")
    assert found("held_too_long", held_after=300)
    pglock_settings(HELD_AFTER=None)
    assert not found("held_too_long")


def test_a_lock_of_which_nobody_says_since_when_it_is_held_is_not_judged(session):
    session().does("SELECT pg_advisory_lock(7)")
    assert report(held_after=0)["held"] == 1
    assert not found("held_too_long", held_after=0)


def test_a_wait_of_any_kind_that_is_too_long_is_told(session, pglock_settings):
    holder, waiter = session(), session(application_name="import")
    holder.does("BEGIN", f"LOCK {Entry._meta.db_table}")
    waiter.waits(f"SELECT FROM {Entry._meta.db_table}")
    (one,) = wait_until(lambda: found("waiting_too_long", waiting_after=0.2), "it waits long enough")
    assert (one["pid"], one["lock"]) == (waiter.pid, "RELATION ACCESS_SHARE tests_entry")
    assert one["text"].startswith(
        f"import (backend {waiter.pid}) has waited for RELATION ACCESS_SHARE tests_"
    )
    assert not found("waiting_too_long")
    pglock_settings(WAITING_AFTER=0.2)
    assert found("waiting_too_long")
    assert not found("waiting_too_long", waiting_after=60)
    pglock_settings(WAITING_AFTER=None)
    assert not found("waiting_too_long") + found("blocked_chain")


def test_who_holds_up_others_for_too_long_is_told_with_how_many_wait_behind_him(session):
    root, middle, last = session(application_name="psql"), session(), session()
    root.does("SELECT pg_advisory_lock(1)")
    middle.does("SELECT pg_advisory_lock(2)")
    middle.waits("SELECT pg_advisory_lock(1)")
    last.waits("SELECT pg_advisory_lock(2)")
    (one,) = wait_until(lambda: found("blocked_chain", waiting_after=0.3), "they wait long enough")
    assert (one["pid"], one["behind"]) == (root.pid, 2)
    assert one["seconds"] >= 0.3
    assert one["text"].startswith(f"{root.pid} psql, IDLE for")
    assert "holds up 2 others, one of them for 0:00:0" in one["text"]
    assert not found("blocked_chain")


def test_a_deadlock_that_postgresql_does_not_see_is_told_at_once(session):
    names = ["pglock:a", "celery:a", "pglock:b", "celery:b"]
    lock_1, work_1, lock_2, work_2 = [session(application_name=name) for name in names]
    lock_1.does("SELECT pg_advisory_lock(1)")
    work_2.does("SELECT pg_advisory_lock(2)")
    work_1.waits("SELECT pg_advisory_lock(2)")
    assert not found("hidden_cycle")
    lock_2.waits("SELECT pg_advisory_lock(1)")
    (one,) = found("hidden_cycle")
    assert set(one["pids"]) == {work_1.pid, lock_2.pid}
    assert one["text"].startswith("cycle: ")


def test_a_deadlock_that_postgresql_sees_is_left_to_it(session):
    one, other = session(), session()
    for somebody, number in ((one, 1), (other, 2)):
        somebody.does("SET deadlock_timeout = '60s'", f"SELECT pg_advisory_lock({number})")
    one.waits("SELECT pg_advisory_lock(2)")
    other.waits("SELECT pg_advisory_lock(1)")
    assert not found("hidden_cycle")
    assert found("blocked_chain", waiting_after=0)


def test_keys_that_were_skipped_often_in_this_hour_and_the_last_are_told(rival, pglock_settings):
    count("shop.tasks.bill", "a", 6)
    count("shop.tasks.bill", "a", 4, hours_ago=1)
    count("shop.tasks.bill", "b", 9, hours_ago=1)
    count("shop.tasks.bill", "c", 100, hours_ago=2)
    told = report()
    assert told["skipped"] == 19
    assert told["findings"] == [
        {
            "kind": "skipped_often",
            "text": "shop.tasks.bill was skipped 10 times in this hour and the last because of 'a'",
            "task_name": "shop.tasks.bill",
            "name": "a",
            "skips": 10,
        }
    ]
    assert [one["name"] for one in found("skipped_often", skipped_after=9)] == ["a", "b"]
    assert not found("skipped_often", skipped_after=11)
    pglock_settings(SKIPPED_AFTER=11)
    assert not found("skipped_often")


def test_of_one_kind_the_worst_are_told_and_the_others_counted(session):
    somebody = session()
    held = [Holding(key(number), time.time() - 1000 - number) for number in range(60)]
    for start in (0, 20, 40):
        somebody = session()
        somebody.does(*(f"SELECT pg_advisory_lock({number})" for number in range(start, start + 20)))
        somebody.does(labels.comment(Owner(), held[start : start + 20], show_names=True) + "SELECT 1")
    told = found("held_too_long")
    assert len(told) == MOST_OF_ONE_KIND + 1
    assert [one["name"] for one in told[:2]] == ["59", "58"]
    assert told[-1] == {"kind": "held_too_long", "text": "10 more: held too long", "left_out": 10}
    for number in range(60):
        count("shop.tasks.bill", str(number), 1000 + number)
    told = found("skipped_often")
    assert [one.get("name") for one in told[:2]] == ["59", "58"]
    assert (len(told), told[-1]["left_out"]) == (MOST_OF_ONE_KIND + 1, 10)


def test_the_numbers_are_of_all_locks_but_those_of_the_report_itself(session):
    holds(session(), "old", 100)
    holds(session(), "new", 10)
    session().waits(f"SELECT pg_advisory_lock({key('old').arguments[0]})")
    told = report()
    assert (told["held"], told["waiting"], told["skipped"]) == (2, 1, 0)
    assert 100 <= told["longest_held"] < 120
    assert 0 <= told["longest_wait"] < 20
    assert (told["using"], told["findings"], told["unread"]) == ("default", [], [])


def test_the_marker_of_a_critical_task_is_no_lock_to_count(session):
    session().does(f"SELECT pg_advisory_lock_shared({markers.CRITICAL}, 5)")
    session().does("SELECT pg_advisory_lock_shared(1, 5)")
    assert report()["held"] == 1


def test_what_this_role_may_not_read_is_told(session):
    holds(session(), "a", 1000)
    holds(session(), "b", 1000)
    with as_ordinary_role():
        told = reports.report("default", Thresholds(300, 60, 10), lambda runs: (runs, ()))
    assert (told.held, told.findings, told.skipped) == (2, (), None)
    hidden, skips_ = told.unread
    assert hidden.startswith("what 2 backends of other roles say of their locks: this role may not read it")
    assert skips_.startswith("the counts of skips: permission denied")


@pytest.mark.parametrize("name", ["nul\0nul", "tab\tnew\nline", "é🔒 <b>"])
def test_any_text_can_be_told_and_kept(name, session, log):
    holds(session(), name, 1000, Owner(name, name, name))
    (one,) = found("held_too_long")
    assert one["name"] == one["task_name"] == name.replace("\0", "\ufffd")
    assert one["text"].isprintable()
    assert LockReport.objects.get().findings[0]["name"] == one["name"]
    assert all(line.isprintable() for _, line in log())


def test_a_holder_whose_clock_is_ahead_has_just_begun(session):
    holds(session(), "a", -1000)
    assert report()["longest_held"] == 0


def test_no_query_is_told(session):
    holder = session()
    holder.does("SELECT pg_advisory_lock(7), 'canary'")
    session().waits("SELECT pg_advisory_lock(7), 'canary'")
    told = report(held_after=0, waiting_after=0)
    assert {one["kind"] for one in told["findings"]} >= {"waiting_too_long", "blocked_chain"}
    assert "canary" not in json.dumps(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"using": "defualt"}, "'defualt', which is not in DATABASES. Did you mean 'default'"),
        ({"held_after": -1}, r"report_locks\(held_after=...\) must be"),
        ({"waiting_after": "5"}, r"report_locks\(waiting_after=...\) must be"),
        ({"skipped_after": 0}, r"report_locks\(skipped_after=...\) must be an int of 1 or more"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message, rival):
    with pytest.raises(LockMisuse, match=message):
        report(**arguments)


# Where it is told


def test_each_finding_is_a_line_in_the_log(session, log):
    report()
    assert log() == [
        ("INFO", "Locks of alias 'default': nothing to tell of 0 held, 0 waiting, 0 skipped lately")
    ]
    holds(session(), "a", 1000)
    holds(session(), "b", 900)
    told = report()["findings"]
    assert log()[1:] == [("WARNING", f"Locks of alias 'default': {one['text']}") for one in told]
    assert len(told) == 2


def test_a_signal_tells_of_it_and_a_receiver_that_fails_does_no_harm(session, caplog):
    holds(session(), "a", 1000)
    told = []

    def fails(**_):
        raise ZeroDivisionError

    def notes(sender, report, using, **_):
        told.append((sender, using, report.in_json()))

    signals.locks_reported.connect(fails)
    signals.locks_reported.connect(notes)
    try:
        result = report(using="locks")
    finally:
        signals.locks_reported.disconnect(fails)
        signals.locks_reported.disconnect(notes)
    assert told == [(None, "locks", result)]
    assert len(result["findings"]) == 1


def test_a_history_has_what_the_task_gave(session):
    holds(session(), "a", 1000)
    told = report()
    kept = LockReport.objects.get()
    assert kept.findings == told["findings"] != []
    assert (kept.held, kept.waiting, kept.skipped, kept.unread) == (1, 0, 0, [])
    assert (kept.longest_held.total_seconds(), kept.longest_wait) == (told["longest_held"], None)
    assert kept.at.isoformat() == told["at"]


def test_what_is_older_than_the_retention_is_dropped_but_for_tokens_and_the_window(rival, pglock_settings):
    pglock_settings(RETENTION=timedelta(days=2))
    now = timezone.now()
    for days in (1, 3):
        LockReport.objects.create(at=now - timedelta(days=days))
        count("task", str(days), 1, hours_ago=24 * days)
        count("task", str(days), 1, hours_ago=24 * days, model=LossCount)
    KeyState.objects.create(
        objsubid=1,
        classid=1,
        objid=1,
        timeline=1,
        number=1,
        lease=1,
        task_id="",
        is_clean=True,
        was_clean=True,
        was_lease=1,
        was_task_id="",
    )
    report()
    assert [one.at for one in LockReport.objects.filter(at__lt=now)] == [now - timedelta(days=1)]
    assert [one.key for one in (*SkipCount.objects.all(), *LossCount.objects.all())] == ["1", "1"]
    assert KeyState.objects.count() == 1
    pglock_settings(RETENTION=1)
    count("task", "now", 1, hours_ago=1)
    report()
    assert not LockReport.objects.filter(at__lt=now).exists()
    assert [one.key for one in SkipCount.objects.all()] == ["now"]


@pytest.mark.parametrize("retention", [None, 10**12])
def test_without_a_retention_everything_is_kept(retention, rival, pglock_settings):
    pglock_settings(RETENTION=retention)
    LockReport.objects.create(at=timezone.now() - timedelta(days=10_000))
    count("task", "old", 1, hours_ago=100_000)
    report()
    assert (LockReport.objects.count(), SkipCount.objects.count()) == (2, 1)


def test_a_backlog_is_dropped_batch_by_batch_around_rows_that_somebody_works_on(rival, monkeypatch):
    monkeypatch.setattr("celery_pglock.histories.BATCH", 2)
    monkeypatch.setattr("celery_pglock.histories.MOST_BATCHES", 3)
    for number in range(9):
        count("task", str(number), 1, hours_ago=10_000)
    kept = SkipCount.objects.order_by("pk")[0]
    with rival.connection.transaction():
        rival.connection.execute("UPDATE celery_pglock_skipcount SET count = 2 WHERE id = %s", [kept.pk])
        assert report()["unread"] == []
        assert SkipCount.objects.count() == 3
        assert report()["unread"] == []
    assert [one.pk for one in SkipCount.objects.all()] == [kept.pk]


# What is waited for


@pytest.mark.parametrize(
    ("table", "unread", "kept"),
    [
        (
            "celery_pglock_skipcount",
            ["the counts of skips", "what is old stays in celery_pglock_skipcount"],
            1,
        ),
        ("celery_pglock_losscount", ["what is old stays in celery_pglock_losscount"], 1),
        (
            "celery_pglock_lockreport",
            ["what is old stays in celery_pglock_lockreport", "the report is not in the history"],
            0,
        ),
        ("celery_pglock_act", [], 1),
        ("tests_entry", [], 1),
    ],
)
def test_a_table_that_somebody_locks_costs_what_is_in_it_and_no_time(table, unread, kept, session, log):
    holds(session(), "a", 1000)
    locker = session()
    locker.does("BEGIN", f"LOCK {table} IN ACCESS EXCLUSIVE MODE")
    seen = []
    done = threading.Event()

    def look():
        watcher = session()
        sql = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
        while not done.is_set():
            seen.append(watcher.ask(sql, table))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        told = report()
    finally:
        done.set()
        thread.join()
    locker.does("ROLLBACK")
    assert not any(seen)
    assert seen
    assert [one["kind"] for one in told["findings"]] == ["held_too_long"]
    assert [one.partition(":")[0] for one in told["unread"]] == unread, told["unread"]
    assert all("it is taken" in one for one in told["unread"])
    assert (told["skipped"] is None) == (table == "celery_pglock_skipcount")
    assert log()[1:] == [("WARNING", f"Locks of alias 'default', not told: {one}") for one in told["unread"]]
    assert LockReport.objects.count() == kept
    # What is kept says what was not read, but cannot say that it was not written itself.
    assert not kept or LockReport.objects.get().unread == told["unread"]


def test_a_table_that_is_missing_is_told_with_the_cure(rival):
    rival.connection.execute("ALTER TABLE celery_pglock_skipcount RENAME TO elsewhere")
    try:
        told = report()
    finally:
        rival.connection.execute("ALTER TABLE elsewhere RENAME TO celery_pglock_skipcount")
    assert "run manage.py migrate celery_pglock --database=default" in told["unread"][0]


def test_where_locks_cannot_be_read_the_task_fails_with_the_error(rival):
    rival.connection.execute("ALTER VIEW celery_pglock_pglock RENAME TO away")
    try:
        with pytest.raises(LockMisuse, match="migrate celery_pglock"):
            report()
    finally:
        rival.connection.execute("ALTER VIEW away RENAME TO celery_pglock_pglock")


def test_two_reports_of_one_alias_do_not_run_at_once(rival):
    with held_elsewhere(report_locks.lock_for(using=None)):
        assert report() is None
        assert report(using="default") is None
        assert report_locks.apply(["default"]).get() is None
        assert report(using="locks")["using"] == "locks"


@pytest.mark.parametrize("module", ["django.conf.global_settings", ""])
def test_without_the_app_calling_it_says_what_is_missing_and_the_classes_are_there(module):
    code = "from celery_pglock.tasks import AdvisoryTask, report_locks; print(AdvisoryTask.__name__);"
    code += " import os, django; os.environ['DJANGO_SETTINGS_MODULE'] and django.setup(); report_locks()"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": module}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert answer.stdout == "AdvisoryTask\n"
    assert "LockMisuse: celery_pglock.report_locks needs 'celery_pglock' in INSTALLED_APPS" in answer.stderr


def test_whoever_does_not_run_it_need_not_be_able_to():
    """Behind a pooler in transaction mode a worker with tasks that lock in sessions is refused."""
    bare = Celery("bare", set_as_current=False)
    for name in list(bare.tasks):
        if not name.startswith("celery"):
            del bare.tasks[name]
    assert session_level_aliases(bare) == {}
    assert "celery_pglock.report_locks" in bare.tasks


def test_where_only_transactions_can_lock_it_can_run_in_one(session):
    bare = Celery("bare", set_as_current=False)
    bare.conf.task_annotations = {"celery_pglock.report_locks": {"lock_xact": True}}
    holds(session(), "a", 1000)
    told = bare.tasks["celery_pglock.report_locks"].apply().get()
    assert [one["kind"] for one in told["findings"]] == ["held_too_long"]
    assert LockReport.objects.count() == 1


# Holders without a running task


def pretends(somebody, worker, task_id="no-task", name="forgotten"):
    """Make somebody hold a lock as if for a task of this worker."""
    return holds(somebody, name, 5, Owner("shop.tasks.bill", task_id, worker))


def test_a_holder_whose_worker_runs_no_such_task_is_told_and_one_that_runs_is_not(worker, session):
    pid = pretends(session(), "celery@test")
    running = skips.delay("running", 60)
    wait_until(lambda: PGLock.objects.filter(task_id=running.id).exists(), "it holds its lock")
    told = report()
    running.revoke(terminate=True, signal="SIGKILL")
    (one,) = told["findings"]
    assert (one["kind"], one["pid"], one["task_id"]) == ("no_running_task", pid, "no-task")
    assert one["text"].startswith(
        f"shop.tasks.bill [no-task] on celery@test (backend {pid}) does not run on its worker, and has held"
        f" ADVISORY EXCLUSIVE 'forgotten' for 0:00:0"
    )
    assert told["unread"] == []


def test_a_worker_that_does_not_answer_is_told_and_its_tasks_are_not_judged(session):
    pretends(session(), "celery@nowhere")
    told = report()
    assert (told["findings"], told["unread"]) == (
        [],
        ["whether tasks run: worker celery@nowhere did not answer"],
    )
    assert LockReport.objects.get().unread == told["unread"]


@pytest.mark.parametrize(
    "owner",
    [
        Owner(),
        Owner("shop.tasks.bill", "eager", "host-without-a-worker"),
        Owner("shop.tasks.bill", "x" * 300, "celery@nowhere"),
        Owner("shop.tasks.bill", "", "celery@nowhere"),
    ],
)
def test_what_no_worker_could_know_of_is_not_asked(owner, session):
    holds(session(), "a", 5, owner)
    assert (report()["findings"], report()["unread"]) == ([], [])


def test_a_lock_that_is_freed_while_the_workers_are_asked_is_not_told(session):
    for somebody, frees in ((session(), True), (session(), False)):
        pid = pretends(somebody, "celery@somewhere")

        def all_unknown(runs, somebody=somebody, frees=frees):
            if frees:
                somebody.does("SELECT pg_advisory_unlock_all()")
            return runs, ()

        told = reports.report("default", NEVER, all_unknown)
        assert [one["pid"] for one in told.findings] == ([] if frees else [pid])


def test_a_lock_that_its_session_took_anew_while_the_workers_are_asked_is_not_told(session):
    somebody = session()
    pretends(somebody, "celery@somewhere")

    def all_unknown(runs):
        somebody.does("SELECT pg_advisory_unlock_all()")
        holds(somebody, "forgotten", 1, Owner("shop.tasks.bill", "no-task", "celery@somewhere"))
        return runs, ()

    assert reports.report("default", NEVER, all_unknown).findings == ()


def test_a_broker_that_is_away_is_told_and_the_rest_nonetheless(session, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    holds(session(), "a", 1000, Owner("shop.tasks.bill", "no-task", "celery@nowhere"))
    away = Celery("away", set_as_current=False)
    started = time.monotonic()
    limits = Thresholds(300, 60, 10)
    told = reports.report("default", limits, lambda runs: running_tasks.not_running(away, runs))
    assert time.monotonic() - started < PATIENCE
    assert [one["kind"] for one in told.findings] == ["held_too_long"]
    (unread,) = told.unread
    assert unread.startswith("whether tasks run: Error 111 connecting")


def test_workers_that_take_no_remote_control_are_not_asked(session):
    pretends(session(), "celery@nowhere")
    deaf = Celery("deaf", set_as_current=False)
    deaf.conf.worker_enable_remote_control = False
    told = deaf.tasks["celery_pglock.report_locks"].apply().get()
    assert (told["findings"], told["unread"]) == (
        [],
        ["whether tasks run: the workers take no remote control"],
    )


def test_a_solo_worker_reports_without_waiting_for_its_own_answer(session):
    options = ["-I", "celery_pglock.tasks"]
    with running_worker("reporting-solo", *options, pool="solo") as worker:
        told = report_locks.apply_async(queue=worker.queue).get(timeout=10)
        assert (told["held"], told["findings"], told["unread"]) == (0, [], [])
        busy = skips.apply_async(["busy", 3], queue=worker.queue)
        wait_until(lambda: PGLock.objects.filter(task_id=busy.id).exists(), "it holds its lock")
        told = report()
        assert told["findings"] == []
        assert told["unread"] == [f"whether tasks run: worker {worker.queue}@test did not answer"]


def test_a_worker_that_knows_all_its_tasks_is_waited_for_no_longer(worker, rival, monkeypatch):
    monkeypatch.setattr(running_tasks, "PATIENCE", 60.0)
    running = skips.delay("running", 60)
    wait_until(lambda: PGLock.objects.filter(task_id=running.id).exists(), "it holds its lock")
    started = time.monotonic()
    assert running_tasks.not_running(app, frozenset([("celery@test", running.id)])) == (frozenset(), ())
    running.revoke(terminate=True, signal="SIGKILL")
    assert time.monotonic() - started < PATIENCE


def test_a_worker_that_answers_by_an_error_has_not_answered(session):
    with running_worker("reported-failing", pool="solo", TASKS="failing_controls"):
        pretends(session(), "reported-failing@test")
        told = report()
    assert told["findings"] == []
    assert told["unread"] == ["whether tasks run: worker reported-failing@test did not answer"]


def test_of_two_workers_with_one_name_both_are_asked(session):
    same = ["-n", "same@test"]
    with (
        running_worker("reported-first", *same, pool="threads"),
        running_worker("reported-second", *same, pool="threads") as second,
    ):
        running = skips.apply_async(["running", 6], queue=second.queue)
        wait_until(lambda: PGLock.objects.filter(task_id=running.id).exists(), "it holds its lock")
        run = "same@test", running.id
        for _ in range(3):
            assert running_tasks.not_running(app, frozenset([run])) == (frozenset(), ())
        assert running_tasks.not_running(app, frozenset([run, ("same@test", "other")])) == (
            frozenset([("same@test", "other")]),
            (),
        )
