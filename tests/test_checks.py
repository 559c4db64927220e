"""What manage.py check tells, and that it keeps silent otherwise."""

import inspect
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery import Celery, Task, _state
from django.conf import settings
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection, connections

from celery_pglock import AdvisoryTask, LockMisuse, Raise, Retry, Skip, XactAdvisoryTask, install
from celery_pglock.findings import DOCUMENTATION
from celery_pglock.schedules import beat_entries
from celery_pglock.task_options import session_level_aliases
from tests.bystanders import bystanders

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/reference/checks.md"
MESSAGE = re.compile(
    r"^(?P<obj>.+?): \(celery_pglock\.(?P<id>\w+)\) (?P<text>(?:.|\n)*?)"
    r"\n\tHINT: (?P<hint>.+) See (?P<link>\S+)$",
    re.MULTILINE,
)

# Roles are the whole server's; all who collect these tests must call them the same.
PREFIX = f"checks_{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
MINE, OTHER = f"{PREFIX}_mine", f"{PREFIX}_other"


def _shares_a_task_of_a_test(finalizer):
    function = inspect.getclosurevars(finalizer).nonlocals.get("fun")
    return function is not None and not function.__module__.startswith(("celery.", "celery_pglock."))


@pytest.fixture
def app(monkeypatch):
    # A shared task is one of every app that is finalized from then on, and so of other tests.
    of_no_test = {one for one in _state._on_app_finalizers if not _shares_a_task_of_a_test(one)}
    monkeypatch.setattr(_state, "_on_app_finalizers", of_no_test)
    # Celery prefers the variable to what an app says.
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    with Celery("checked", set_as_current=False, broker="redis://", backend="cache+memory://") as app:
        monkeypatch.setattr("celery_pglock.checks.current_app", app)
        yield app


@pytest.fixture
def add(app):
    def add(name, base=AdvisoryTask, **options):
        @app.task(base=base, name=name, **options)
        def task(account=1):
            pass

        return task

    return add


def parsed(output):
    found = {}
    for message in MESSAGE.finditer(output):
        assert message["link"] == f"{DOCUMENTATION}reference/checks.html#{message['id'].lower()}"
        found[message["id"], message["obj"]] = message["text"]
    assert len(found) == output.count("(celery_pglock."), "each with its hint and its link"
    return found


def told(*aliases):
    """What was told, by its id and what it was found in."""
    try:
        call_command("check", databases=list(aliases) or None, fail_level="WARNING", no_color=True)
    except SystemCheckError as error:
        return parsed(str(error))
    return {}


def test_a_normal_project_is_told_nothing(app, add):
    app.conf.update(task_time_limit=600, task_soft_time_limit=500, task_acks_late=True)
    app.conf.beat_schedule = beat_entries(report_locks=60, prioritize_critical_tasks=10)
    add("plain", Task)
    add("default")
    add("waits", lock_timeout=30, lock_side_effect=Skip())
    add("retries", lock_side_effect=Retry(countdown=5, deadline=600))
    add("critical", lock_timeout=60, lock_priority=1)
    add("in_transaction", XactAdvisoryTask, lock_timeout=5)
    add("endless", lock_timeout=None, lock_limit=2)
    assert told() == {}


def test_a_setting_that_cannot_be_used_is_an_error(app, add, pglock_settings):
    pglock_settings(TIMOUT=3)
    add("in_order")
    found = told("default")
    assert "Did you mean 'TIMEOUT'" in found.pop(("E001", "CELERY_PGLOCK"))
    assert found == {}


class TestTasksThatCannotBeUsed:
    def test_each_of_them_is_told_and_again_by_the_next_check(self, app, add):
        add("a", lock_kei="x")
        add("b", lock_key="{acount}")
        add("c")
        add("d", lock_timeout=5, time_limit=5)
        found = told()
        assert set(found) == {("E002", "a"), ("E002", "b"), ("E002", "d")}
        assert "lock_kei" in found["E002", "a"]
        assert "acount" in found["E002", "b"]
        assert told() == found

    def test_the_apps_time_limits_end_a_task_that_waits(self, app, add):
        app.conf.update(task_soft_time_limit=60, task_time_limit=70)
        add("stated", lock_timeout=60)
        add("shorter", lock_timeout=59)
        add("of_its_own", lock_timeout=60, soft_time_limit=65)
        add("strict", lock_strict=True, soft_time_limit=18)
        found = told()
        assert set(found) == {("E002", "stated"), ("E002", "strict")}
        assert "lock_timeout (60 s) leaves nothing of soft_time_limit (60 s)" in found["E002", "stated"]

    def test_what_was_told_is_refused_all_the_same(self, app, add):
        add("c")
        wrong = add("a", lock_kei="x")
        assert told()
        with pytest.raises(LockMisuse, match="lock_kei"):
            session_level_aliases(app)
        for _ in range(2):
            with pytest.raises(LockMisuse, match="lock_kei"):
                wrong.apply(throw=True)

    def test_without_a_check_before_it_binding_refuses_at_once(self, app, add):
        add("a", lock_kei="x")
        with pytest.raises(LockMisuse, match="lock_kei"):
            app.finalize()

    def test_the_command_tells_of_all_and_a_worker_in_the_same_process_does_not_start(self, transactional_db):
        code = """
import sys; from tests.celery_app import app; import django; django.setup()
from django.core.management import call_command; from django.core.management.base import SystemCheckError
try: call_command("check", no_color=True, fail_level="WARNING")
except SystemCheckError as error: print(error, flush=True)
app.worker_main(["worker", "--pool=solo", "-Q", "checked", "--without-gossip", "--without-mingle"])
"""
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TASKS": "misused_tasks", "DJANGO_SETTINGS_MODULE": "tests.settings"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        names = {name: f"tests.misused_tasks.{name}" for name in ("misspelt", "misnamed", "foreign")}
        assert set(parsed(ended.stdout)) == {
            ("E002", names["misspelt"]),
            ("E002", names["misnamed"]),
            ("W007", names["foreign"]),
        }
        assert ended.returncode == 1
        assert "LockMisuse" not in ended.stderr
        assert names["misspelt"] in ended.stderr or names["misnamed"] in ended.stderr


def test_a_project_that_does_not_load_its_celery_app_is_told_so():
    command = [sys.executable, "-m", "django", "check"]
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "WITHOUT_THE_ADMIN": "yes"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert parsed(ended.stderr) == {
        ("W013", "Celery"): "No Celery app was loaded when Django started, so that no task is checked."
    }


class TestSettingsThatDoNotGoWithATask:
    def test_the_projects_timeout_outlasts_time_limits(self, app, add, pglock_settings):
        pglock_settings(TIMEOUT=120)
        app.conf.task_time_limit = 100
        add("of_all")
        add("of_its_own", time_limit=119)
        add("longer", time_limit=121)
        add("stated", lock_timeout=0)
        found = told()
        assert set(found) == {("E004", "of_all"), ("E004", "of_its_own")}
        for name, limit in (("of_all", 100), ("of_its_own", 119)):
            text = f"CELERY_PGLOCK['TIMEOUT'] (120 s) leaves nothing of time_limit ({limit} s)"
            assert text in found["E004", name]

    def test_the_delay_of_strict_locks_by_default_outlasts_time_limits(self, app, add, pglock_settings):
        app.conf.task_time_limit = 10
        add("default")
        assert told() == {}
        pglock_settings(STRICT=True)
        assert set(told()) == {("E004", "default")}
        pglock_settings(LEASE=10)
        assert told() == {}

    def test_locks_that_cannot_be_strict_by_default(self, add, pglock_settings):
        pglock_settings(STRICT=True)
        add("shared", lock_shared=True)
        add("limited", lock_limit=2)
        add("computed", lock_limit=lambda account: 1)
        add("not_strict", lock_shared=True, lock_strict=False)
        add("in_transaction", XactAdvisoryTask, lock_shared=True)
        assert set(told()) == {("E004", "shared"), ("E004", "limited")}


class TestBeatWithoutTheApp:
    def test_its_tasks_are_an_error(self):
        code = """
import sys; from django.conf import settings; from celery import Celery
apps = sys.argv[1:]
settings.configure(INSTALLED_APPS=apps, DATABASES={"default": {"ENGINE": "django.db.backends.postgresql"}})
import django; django.setup()
from celery_pglock import checks; from celery_pglock.schedules import beat_entries
checks.register(); checks.register()
app = Celery("project", broker="memory://"); app.set_default()
app.conf.beat_schedule = beat_entries(report_locks=None, prioritize_critical_tasks=10)
from django.core.management import call_command
call_command("check", no_color=True)
"""
        without, installed = (
            subprocess.run([sys.executable, "-c", code, *apps], cwd=ROOT, capture_output=True, text=True)
            for apps in ([], ["celery_pglock"])
        )
        assert set(parsed(without.stderr)) == {("E005", "INSTALLED_APPS")}
        assert installed.returncode == 0, installed.stderr
        assert without.returncode == 1


class TestWarnings:
    def test_waiting_for_ever_without_a_time_limit(self, app, add, pglock_settings):
        add("a", lock_timeout=None)
        add("limited", lock_timeout=None, time_limit=60)
        add("d")
        assert set(told()) == {("W003", "a")}
        pglock_settings(TIMEOUT=None)
        found = told()
        assert set(found) == {("W003", "a"), ("W003", "CELERY_PGLOCK['TIMEOUT']")}
        assert "Every task without lock_timeout (d)" in found["W003", "CELERY_PGLOCK['TIMEOUT']"]
        for name in "efg":
            add(name)
        assert "(d, e, f and 1 more)" in told()["W003", "CELERY_PGLOCK['TIMEOUT']"]
        app.conf.task_soft_time_limit = 60
        assert told() == {}

    def test_critical_tasks_that_do_not_wait(self, add):
        add("a", lock_priority=1)
        assert set(told()) == {("W002", "a")}

    def test_retries_whose_deadline_comes_first(self, add, pglock_settings):
        add("never", lock_side_effect=Retry(countdown=60, deadline=29))
        add("by_luck", lock_side_effect=Retry(countdown=60, deadline=30))
        add("without_luck", lock_side_effect=Retry(countdown=60, deadline=59, jitter=False))
        add("at_most", lock_side_effect=Retry(countdown=60, maximum=20, deadline=10))
        add("at_once", lock_side_effect=Retry(countdown=0, deadline=0))
        add("otherwise", lock_side_effect=Raise())
        assert set(told()) == {("W005", "never"), ("W005", "without_luck")}
        pglock_settings(SIDE_EFFECT=Retry(countdown=10, deadline=1))
        assert ("W005", "CELERY_PGLOCK['SIDE_EFFECT']") in told()

    def test_a_retry_of_ones_own_decides_for_itself(self, add):
        class Patient(Retry):
            def on_conflict(self, conflict):
                return conflict.retry(60)

        add("own", lock_side_effect=Patient(countdown=60, deadline=1))
        assert told() == {}

    def test_messages_that_are_delivered_again_during_the_wait(self, app, add):
        app.conf.broker_transport_options = {"visibility_timeout": 60}
        late = {"acks_late": True}
        add("waits", lock_timeout=60, **late)
        add("for_ever", lock_timeout=None, time_limit=90, **late)
        add("limited", lock_timeout=None, time_limit=30, **late)
        add("shorter", lock_timeout=59, **late)
        add("early", lock_timeout=60)
        found = told()
        assert set(found) == {("W006", "waits"), ("W006", "for_ever")}
        assert "after 60 s (visibility_timeout)" in found["W006", "waits"]

    def test_messages_that_are_delivered_again_during_the_body_and_whose_result_is_forgotten(self, app, add):
        late = {"acks_late": True, "time_limit": 7200}
        add("forgets", ignore_result=True, **late)
        add("keeps", **late)
        add("ends", ignore_result=True, acks_late=True, time_limit=600)
        app.conf.task_time_limit = 7201
        add("of_all", ignore_result=True, acks_late=True)
        assert set(told()) == {("W006", "forgets")}
        app.conf.result_backend = None
        assert set(told()) == {("W006", "forgets"), ("W006", "keeps")}

    def test_a_broker_without_a_visibility_timeout_delivers_nothing_again(self, app, add):
        app.conf.broker_url = "amqp://"
        app.conf.broker_transport_options = {"visibility_timeout": 60}
        add("waits", lock_timeout=60, acks_late=True)
        assert told() == {}

    def test_a_broker_that_is_not_known_here_is_not_judged(self, app, add):
        app.conf.broker_url = "carrier-pigeon://"
        add("waits", lock_timeout=7200, acks_late=True)
        assert told() == {}

    def test_options_of_a_task_that_takes_no_lock(self, app, add):
        class Base(Task):
            abstract = True
            lock_by = ("account",)

        add("stated", Task, lock_timeout=5, lock_shared=True)
        add("inherited", Base)
        add("without", Task)
        found = told()
        assert set(found) == {("W007", "stated"), ("W007", "inherited")}
        assert "has lock_shared, lock_timeout, and takes no lock" in found["W007", "stated"]

    def test_rules_that_match_no_task_are_told(self, app, add):
        app.conf.task_annotations = {"anotated": {"lock_key": "k"}, "gone": {"rate_limit": "1/s"}}
        install(app, {"third.*": {"lock_key": "k"}, "thrid.*": {"lock_key": "k"}})
        add("third.add", Task)
        found = told()
        assert set(found) == {("W011", "install()"), ("W011", "task_annotations")}
        assert "The rule 'thrid.*' of install() matches no task." in found["W011", "install()"]
        assert "'anotated', which is no task" in found["W011", "task_annotations"]

    def test_a_rule_that_does_not_fit_its_task_is_told_as_an_option_is(self, app, add):
        install(app, {"third.*": {"lock_by": ("acount",)}})
        add("third.add", Task)
        assert "Did you mean 'account'" in told()["E002", "third.add"]

    def test_tasks_that_cannot_be_imported_here_stop_no_command(self, app, add):
        app.conf.imports = ["is_on_workers_alone"]
        add("a", lock_priority=1)
        found = told("default")
        assert set(found) == {("W012", "Celery")}
        assert "ModuleNotFoundError: No module named 'is_on_workers_alone'" in found["W012", "Celery"]

    def test_celerys_own_tasks_take_none_of_a_task_class_for_all(self, monkeypatch):
        app = Celery("all", set_as_current=False, task_cls=AdvisoryTask, broker="redis://")
        monkeypatch.setattr("celery_pglock.checks.current_app", app)
        assert told() == {}
        assert "celery.chord" in app.tasks


@contextmanager
def options(**values):
    """With these options of the connection."""
    before = connection.settings_dict["OPTIONS"]
    connection.close()
    connection.settings_dict["OPTIONS"] = {**before, **values}
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"] = before


# The checks are those of all apps.
@pytest.mark.django_db(
    transaction=True, available_apps=settings.INSTALLED_APPS, databases=["default", "locks", "sqlite"]
)
class TestServers:
    def test_a_normal_project_is_told_nothing(self, app, add):
        app.conf.beat_schedule = beat_entries(report_locks=60, prioritize_critical_tasks=10)
        add("plain")
        add("strict", lock_strict=True)
        add("critical", lock_timeout=30, lock_priority=1)
        add("in_transaction", XactAdvisoryTask, lock_timeout=30, time_limit=60)
        assert told("default", "sqlite") == {}

    def test_a_task_that_cannot_be_used_keeps_no_other_from_its_check(self, add):
        add("a", lock_kei="x")
        add("b", XactAdvisoryTask, lock_timeout=30)
        with options(options="-c statement_timeout=10s"):
            assert set(told("default")) == {("E002", "a"), ("W004", "b")}

    @pytest.mark.parametrize("base", [AdvisoryTask, XactAdvisoryTask])
    def test_another_database_engine_keeps_no_locks(self, add, base):
        add("a", base, lock_using="sqlite")
        found = told("sqlite")
        assert set(found) == {("E003", "DATABASES['sqlite']")}
        assert "not PostgreSQL but sqlite" in found["E003", "DATABASES['sqlite']"]

    @pytest.mark.parametrize("base", [AdvisoryTask, XactAdvisoryTask])
    def test_a_server_that_does_not_answer(self, add, base, monkeypatch):
        add("a", base, lock_timeout=1)
        connection.close()
        monkeypatch.setitem(connection.settings_dict, "PORT", "1")
        try:
            assert set(told("default")) == {("W001", "DATABASES['default']")}
        finally:
            connection.close()

    def test_transactions_that_end_before_the_wait_for_their_lock(self, add):
        add("a", XactAdvisoryTask, lock_timeout=30)
        add("shorter", XactAdvisoryTask, lock_timeout=9)
        add("for_ever", XactAdvisoryTask, lock_timeout=None, time_limit=90)
        add("polls", XactAdvisoryTask, lock_timeout=30, lock_limit=2)
        add("in_session", lock_timeout=30)
        with options(options="-c statement_timeout=10s"):
            found = told("default")
        assert set(found) == {("W004", "a")}
        assert "after 10 s statement_timeout of DATABASES['default'] ends its wait" in found["W004", "a"]
        assert told("default") == {}

    def test_transactions_that_end_before_their_body(self, add):
        if connection.pg_version < 170000:
            pytest.skip("transaction_timeout came with PostgreSQL 17")
        add("a", XactAdvisoryTask, time_limit=90)
        add("polls", XactAdvisoryTask, lock_timeout=30, lock_limit=2)
        add("shorter", XactAdvisoryTask, time_limit=9)
        add("in_session", time_limit=90)
        with options(options="-c transaction_timeout=10s"):
            found = told("default")
        assert set(found) == {("W004", "a"), ("W004", "polls")}
        assert "ends its body with all its work" in found["W004", "a"]

    def test_strict_locks_without_their_table(self, add, pglock_settings):
        add("a")
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE celery_pglock_keystate RENAME TO elsewhere")
        try:
            assert told("default") == {}
            pglock_settings(STRICT=True)
            found = told("default")
            # `migrate` makes it, and checks first.
            call_command("check", databases=["default"])
        finally:
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE elsewhere RENAME TO celery_pglock_keystate")
        assert set(found) == {("W010", "DATABASES['default']")}
        assert "migrate --database=default" in found["W010", "DATABASES['default']"]

    def test_with_locks_disabled_nobody_is_asked(self, add, pglock_settings):
        add("a", XactAdvisoryTask, lock_timeout=30)
        pglock_settings(ENABLED=False)
        with options(options="-c statement_timeout=10s"):
            assert told("default") == {}


@pytest.fixture
def roles(rival):
    for statement in (f"CREATE ROLE {MINE} LOGIN", f"CREATE ROLE {OTHER} LOGIN"):
        rival.connection.execute(statement)
    yield
    rival.connection.execute(f"DROP OWNED BY {MINE}, {OTHER}")
    rival.connection.execute(f"DROP ROLE {MINE}, {OTHER}")


@pytest.mark.django_db(
    transaction=True, available_apps=settings.INSTALLED_APPS, databases=["default", "locks", "sqlite"]
)
class TestRights:
    @pytest.fixture
    def session(self, roles):
        with bystanders() as make:
            yield make

    @pytest.fixture
    def as_mine(self, session):
        """The project logs in as a role without any rights of others."""
        connection.close()
        before = connection.settings_dict["USER"]
        connection.settings_dict["USER"] = MINE
        yield
        connection.close()
        connection.settings_dict["USER"] = before

    def test_tasks_that_work_as_another_role_can_be_neither_seen_nor_stopped(
        self, app, add, session, rival, as_mine
    ):
        add("a", lock_timeout=30, lock_priority=1)
        assert told("default") == {}
        session(application_name="somebody", role=OTHER)
        assert told("default") == {}
        session(application_name="celery:b", role=OTHER)
        found = told("default")
        where = "DATABASES['default']"
        assert set(found) == {("W008", where), ("W009", where)}
        assert OTHER in found["W008", where]
        assert OTHER in found["W009", where]
        rival.connection.execute(f"GRANT pg_read_all_stats TO {MINE}")
        assert set(told("default")) == {("W008", where)}
        rival.connection.execute(f"GRANT pg_signal_backend TO {MINE}")
        assert told("default") == {}

    def test_a_member_of_their_role_may_do_both(self, app, add, session, rival, as_mine):
        add("a", lock_timeout=30, lock_priority=1)
        session(application_name="pglock:b", role=OTHER)
        rival.connection.execute(f"GRANT {OTHER} TO {MINE}")
        assert told("default") == {}

    def test_where_no_task_locks_nobody_has_to_be_seen(self, app, session, as_mine):
        session(application_name="celery:b", role=OTHER)
        app.conf.beat_schedule = beat_entries(report_locks=None, prioritize_critical_tasks=10)
        assert set(told("default")) == {("W008", "DATABASES['default']")}

    def test_where_nobody_is_to_be_stopped_seeing_is_all_that_is_missing(
        self, app, add, session, rival, as_mine
    ):
        where = "DATABASES['default']"
        session(application_name="pglock:b", role=OTHER)
        assert told("default") == {}
        add("a")
        assert set(told("default")) == {("W009", where)}
        app.conf.beat_schedule = beat_entries(report_locks=None, prioritize_critical_tasks=10)
        assert set(told("default")) == {("W008", where), ("W009", where)}

    def test_roles_are_known_from_the_settings_too(self, app, add, as_mine, monkeypatch):
        add("a")
        add("b", lock_using="locks")
        monkeypatch.setitem(connections["locks"].settings_dict, "NAME", connection.settings_dict["NAME"])
        monkeypatch.setitem(connections["locks"].settings_dict, "USER", OTHER)
        found = told("default")
        assert set(found) == {("W009", "DATABASES['default']")}
        assert OTHER in found["W009", "DATABASES['default']"]


class TestThePage:
    def test_it_has_exactly_the_ids_that_are_told(self):
        rooms = (ROOT / "celery_pglock").glob("*.py")
        told_there = {
            number for room in rooms for number in re.findall(r'^\s+"([EW]\d{3})",$', room.read_text(), re.M)
        }
        assert sorted(told_there) == re.findall(r"^## ([EW]\d{3})$", PAGE.read_text(), re.M)
        assert len(told_there) > 10

    def test_it_is_where_the_projects_metadata_says(self):
        assert f'Documentation = "{DOCUMENTATION}"\n' in (ROOT / "pyproject.toml").read_text()
