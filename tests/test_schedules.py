"""The entries by which beat sends the tasks of ours."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta

import pytest
import redis
from django.conf import settings
from django.db import connection

from celery_pglock import LockMisuse
from celery_pglock.models import LockReport
from celery_pglock.schedules import beat_entries
from tests.conftest import running_worker, wait_until

pytestmark = pytest.mark.long

QUEUE = "scheduled-reports"


def environment(**variables):
    return {
        **os.environ,
        "TEST_DATABASE_NAME": connection.settings_dict["NAME"],
        "REPORT_QUEUE": QUEUE,
        **variables,
    }


@contextmanager
def running_beat(directory, *options, **variables):
    command = [sys.executable, "-m", "celery", "-A", "tests.celery_app", "beat", "--pidfile="]
    with open(directory / "log", "w") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment(**variables))
    try:
        yield directory / "log"
    finally:
        process.kill()
        process.wait()


def test_each_task_that_is_asked_for_has_an_entry():
    assert beat_entries() == {
        "celery_pglock.report_locks": {
            "task": "celery_pglock.report_locks",
            "schedule": 60.0,
            "kwargs": {},
            "options": {"expires": 60.0},
        }
    }
    both = beat_entries(
        report_locks=timedelta(minutes=5), prioritize_critical_tasks=10, queue="operators", using="locks"
    )
    assert [(name, one["task"], one["schedule"]) for name, one in both.items()] == [
        ("celery_pglock.report_locks of locks", "celery_pglock.report_locks", 300.0),
        ("celery_pglock.prioritize_critical_tasks of locks", "celery_pglock.prioritize_critical_tasks", 10.0),
    ]
    assert [(one["kwargs"], one["options"]) for one in both.values()] == [
        ({"using": "locks"}, {"expires": 300.0, "queue": "operators"}),
        ({"using": "locks"}, {"expires": 10.0, "queue": "operators"}),
    ]
    assert beat_entries(report_locks=None) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"report_locks": 0}, r"beat_entries\(report_locks=...\) must be more than 0 seconds, or None"),
        ({"report_locks": "60"}, r"beat_entries\(report_locks=...\) must be a number of seconds"),
        ({"prioritize_critical_tasks": -1}, r"prioritize_critical_tasks=...\) must be"),
        ({"prioritize_critical_tasks": float("inf")}, r"prioritize_critical_tasks=...\) must be more than 0"),
        ({"queue": ""}, r"queue=...\) must be the name of a queue or None, not ''"),
        ({"queue": ["a"]}, r"queue=...\) must be the name"),
        ({"using": "lock"}, r"using=...\) names 'lock', which is not in DATABASES. Did you mean 'locks'"),
    ],
)
def test_what_beat_could_not_use_is_refused(arguments, message):
    with pytest.raises(LockMisuse, match=message):
        beat_entries(**arguments)


def test_a_worker_reports_as_often_as_plain_beat_says(transactional_db, tmp_path):
    with (
        running_worker(QUEUE, "-I", "celery_pglock.tasks"),
        running_beat(tmp_path, "-s", str(tmp_path / "schedule"), REPORT_EVERY="0.5") as log,
    ):
        wait_until(lambda: LockReport.objects.count() >= 2, f"two reports: {log.read_text()}")
    assert [one.unread for one in LockReport.objects.all()[:2]] == [[], []]


def test_beat_sends_it_from_a_schedule_in_the_database_too(transactional_db, tmp_path):
    pytest.importorskip("django_celery_beat", reason="django-celery-beat is not installed")
    stored = {"DJANGO_SETTINGS_MODULE": "tests.beat_settings"}
    migrate = [sys.executable, "-m", "django", "migrate", "--skip-checks", "-v0", "django_celery_beat"]
    with redis.from_url(settings.CELERY_BROKER_URL) as broker:
        broker.delete(QUEUE)
        subprocess.run(migrate, env=environment(**stored), check=True)
        try:
            with running_beat(tmp_path, **stored) as log:
                wait_until(lambda: broker.llen(QUEUE), f"it has sent one: {log.read_text()}")
        finally:
            subprocess.run([*migrate, "zero"], env=environment(**stored), check=True)
        message = json.loads(broker.lindex(QUEUE, 0))
        broker.delete(QUEUE)
    assert message["headers"]["task"] == "celery_pglock.report_locks"
    assert message["headers"]["kwargsrepr"] == "{'using': 'locks'}"
