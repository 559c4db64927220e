"""Settings, durations and the front door."""

import subprocess
import sys
from datetime import timedelta

import pytest

from celery_pglock import LockMisuse, Return, config
from celery_pglock.checks import settings_can_work, tasks_can_work
from celery_pglock.durations import milliseconds, seconds


def test_importing_works_without_django_being_configured():
    code = "import celery_pglock; celery_pglock.AdvisoryTask; celery_pglock.advisory('x')"
    subprocess.run([sys.executable, "-c", code], check=True, env={}, cwd="/")


def test_every_exported_name_exists():
    import celery_pglock

    assert all(hasattr(celery_pglock, name) for name in celery_pglock.__all__)


def test_a_misspelt_setting_is_refused_with_a_guess(pglock_settings):
    pglock_settings(TIMOUT=3)
    with pytest.raises(LockMisuse, match=r"no key 'TIMOUT'. Did you mean 'TIMEOUT'\?"):
        config.current()
    assert [message.id for message in settings_can_work()] == ["celery_pglock.E001"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"TIMEOUT": "5"}, "TIMEOUT"),
        ({"TIMEOUT": -1}, "TIMEOUT"),
        ({"SIDE_EFFECT": "Skip"}, "SIDE_EFFECT"),
        ({"SIDE_EFFECT": Return}, "SIDE_EFFECT"),
        ({"ENABLED": "False"}, "must be True or False"),
        ({"SHOW_NAMES": 1}, "must be True or False"),
        ({"USING": "lock"}, "not in DATABASES. Did you mean 'locks'"),
        ({"USING": "sqlite"}, "not PostgreSQL"),
        ({"LEASE": 0.5}, "between 1 and 3600 seconds"),
        ({"LEASE": None}, "between 1 and 3600 seconds"),
        ({"LEASE": "30"}, "LEASE"),
        ({"POOLER": "transaction"}, "must be None or 'session'"),
        ({"ON_LOST": "warm"}, "Did you mean 'warn'"),
        ({"STRICT": 1}, "must be True or False"),
        ({"HELD_AFTER": "300"}, "CELERY_PGLOCK['HELD_AFTER'] must be"),
        ({"WAITING_AFTER": -1}, "CELERY_PGLOCK['WAITING_AFTER'] must be"),
        ({"SKIPPED_AFTER": 0}, "CELERY_PGLOCK['SKIPPED_AFTER'] must be an int of 1 or more"),
        ({"SKIPPED_AFTER": 1.5}, "an int of 1 or more"),
        ({"SKIPPED_AFTER": True}, "an int of 1 or more"),
        ({"RETENTION": 0}, "CELERY_PGLOCK['RETENTION'] must be longer than 0 seconds"),
        ({"RETENTION": timedelta()}, "or None to keep everything"),
        ({"RETENTION": "30 days"}, "RETENTION"),
    ],
)
def test_a_value_that_cannot_be_used_is_found_by_the_check(pglock_settings, values, message):
    pglock_settings(**values)
    (found,) = settings_can_work()
    assert message in found.msg


def test_settings_that_are_no_dict_are_refused(settings):
    settings.CELERY_PGLOCK = ["USING"]
    with pytest.raises(LockMisuse, match="must be a dict"):
        config.current()


def test_the_checks_find_nothing_in_a_project_that_works():
    assert settings_can_work() == tasks_can_work() == []


@pytest.mark.parametrize(
    ("given", "expected"), [(0, 0.0), (2, 2.0), (timedelta(minutes=1), 60.0), (None, None)]
)
def test_durations_are_numbers_timedeltas_or_none(given, expected):
    assert seconds(given, "timeout") == expected


@pytest.mark.parametrize("given", [-1, True, "3", float("nan"), timedelta(seconds=-1), object()])
def test_what_is_no_duration_is_refused_by_name(given):
    with pytest.raises(LockMisuse, match="lock_timeout must be"):
        seconds(given, "lock_timeout")


def test_milliseconds_are_never_zero_and_never_too_many():
    assert milliseconds(0.0001) == 1
    assert milliseconds(1.5) == 1500
    assert milliseconds(10**9) == milliseconds(float("inf")) == 2**31 - 1
