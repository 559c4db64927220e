"""The database roles of SECURITY.md: what each can do with the rights that the page gives it, not without."""

import json
import os
import re
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import celery
import django
import django_celery_beat
import kombu
import psycopg
import pytest
from django.db import connection

from celery_pglock import LockNotAcquired, Raise, advisory
from celery_pglock.conflicts import PREEMPTED
from celery_pglock.keys import key
from celery_pglock.models import SkipCount
from celery_pglock.tasks import prioritize_critical_tasks, report_locks
from tests import role_tasks as tasks
from tests.conftest import running_worker, wait_until
from tests.documents import sql_blocks

pytestmark = pytest.mark.long

# Roles are the whole server's; all who collect these tests must call them the same.
SUFFIX = (
    f"{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}_{os.environ.get('PYTEST_XDIST_WORKER', '')}"
)
OF_THE_PAGE = re.compile(r"\bshop_(owner|worker|web|operator)\b")
STRANGER = f"shop_stranger_{SUFFIX}"

LOCK_FUNCTIONS = """
SELECT oid::regprocedure::text, pronargs FROM pg_proc
WHERE pronamespace = 'pg_catalog'::regnamespace AND proname LIKE '%advisory%'
"""

LOOK_AT_THE_ADMIN = """
import sys

import django

django.setup()
from django.contrib.auth.models import User
from django.test import Client

client = Client(SERVER_NAME="localhost")
client.force_login(User.objects.get(), backend="django.contrib.auth.backends.ModelBackend")
for page in sys.argv[1:]:
    answer = client.get(f"/admin/celery_pglock/{page}/")
    print(answer.status_code, b"permission denied" in answer.content)
"""

LOCK_IN_A_VIEW = """
import django

django.setup()
from celery_pglock import advisory

with advisory("of a view", timeout=0) as is_mine:
    print(is_mine)
"""


def role(name):
    return f"shop_{name}_{SUFFIX}"


def as_of_this_run(sql):
    return OF_THE_PAGE.sub(lambda found: role(found[1]), sql)


def url(user, database):
    given = urlsplit(os.environ["DATABASE_URL"])
    place = given.netloc.rpartition("@")[2]
    return urlunsplit(
        given._replace(netloc=f"{user}:x@{place}" if user else given.netloc, path=f"/{database}")
    )


def connected(user, database):
    return psycopg.connect(url(user, database), autocommit=True)


def environment(name, database):
    return {"DATABASE_URL": url(role(name), database), "TEST_DATABASE_NAME": database}


def python(name, database, *arguments):
    env = {**os.environ, **environment(name, database), "DJANGO_SETTINGS_MODULE": "tests.settings"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def manage(name, database, *arguments):
    return python(name, database, "-m", "django", *arguments)


@pytest.fixture(scope="module")
def database(django_db_setup):
    """A database that was set up as the page says, and migrated by its owner."""
    name = f"shop_{uuid.uuid4().hex[:8]}"
    roles, inside, *rights = map(as_of_this_run, sql_blocks("SECURITY.md"))
    with connected("", "postgres") as server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            server.execute(roles.replace("LOGIN", "LOGIN PASSWORD 'x'"))
            server.execute(f"CREATE ROLE {STRANGER} LOGIN PASSWORD 'x'")
            with connected("", name) as superuser:
                superuser.execute(inside)
                migrated = manage("owner", name, "migrate", "--run-syncdb", "-v0")
                assert not migrated.returncode, migrated.stderr
                superuser.execute(f"GRANT SELECT, INSERT, UPDATE ON tests_entry TO {role('worker')}")
                for sql in rights:
                    superuser.execute(sql)
            yield name
        finally:
            server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            for one in (*map(role, ("owner", "worker", "web", "operator")), STRANGER):
                server.execute(f"DROP ROLE IF EXISTS {one}")


@pytest.fixture
def superuser(database):
    with connected("", database) as session:
        yield session


@pytest.fixture(scope="module")
def worker(database):
    variables = {**environment("worker", database), "TASKS": "role_tasks"}
    with running_worker("roles", concurrency=3, **variables) as running:
        yield running


@contextmanager
def without(superuser, name, right):
    """A role that lacks one of the rights that the page gives it."""
    superuser.execute(f"REVOKE {right} FROM {role(name)}")
    try:
        yield
    finally:
        superuser.execute(f"GRANT {right} TO {role(name)}")


def run(task, *arguments):
    return task.apply_async(arguments, queue="roles")


def result(task, *arguments):
    return run(task, *arguments).get(timeout=20)


def lines_with(worker, text):
    return wait_until(lambda: [line for line in worker.log.splitlines() if text in line], text)


def a_key():
    return uuid.uuid4().hex


@contextmanager
def taken(superuser, name):
    superuser.execute("SELECT pg_advisory_lock(%s)", key(name).arguments)
    yield
    superuser.execute("SELECT pg_advisory_unlock(%s)", key(name).arguments)


class TestStranger:
    def test_nobody_but_the_roles_of_the_page_connects(self, database):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            connected(STRANGER, database)

    @pytest.mark.django_db(transaction=True)
    def test_by_default_whoever_connects_can_keep_every_key_for_himself(self, database):
        with connected(STRANGER, connection.settings_dict["NAME"]) as stranger:
            stranger.execute("SELECT pg_advisory_lock(%s)", key("invoice:7").arguments)
            assert not advisory("invoice:7", timeout=0).acquire()

    def test_after_the_revoking_none_of_the_functions_is_his(self, superuser, database):
        superuser.execute(f"GRANT CONNECT ON DATABASE {database} TO {STRANGER}")
        try:
            with connected(STRANGER, database) as stranger:
                functions = superuser.execute(LOCK_FUNCTIONS).fetchall()
                assert len(functions) == 21
                for signature, number in functions:
                    call = f"{signature.partition('(')[0]}({', '.join(['1'] * number)})"
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        stranger.execute(f"SELECT {call}")
        finally:
            superuser.execute(f"REVOKE CONNECT ON DATABASE {database} FROM {STRANGER}")

    def test_the_page_finds_what_everybody_may_execute_still(self, superuser):
        (look,) = [sql for sql in sql_blocks("SECURITY.md") if sql.startswith("SELECT")]
        assert superuser.execute(look).fetchall() == []
        superuser.execute("GRANT EXECUTE ON FUNCTION pg_advisory_lock(bigint) TO PUBLIC")
        assert superuser.execute(look).fetchall() == [("pg_advisory_lock(bigint)",)]
        superuser.execute("REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC")

    def test_for_whoever_is_no_superuser_revoking_is_a_warning_that_changes_nothing(self, database):
        sql = "REVOKE EXECUTE ON FUNCTION pg_advisory_lock(bigint) FROM PUBLIC"
        with connected(STRANGER, connection.settings_dict["NAME"]) as stranger:
            told = []
            stranger.add_notice_handler(lambda notice: told.append(notice.severity))
            stranger.execute(sql)
            assert told == ["WARNING"]
            assert stranger.execute("SELECT pg_advisory_xact_lock(1)").fetchall()

    def test_what_a_project_is_made_of_takes_no_advisory_locks(self):
        for package in (django, celery, kombu, psycopg, django_celery_beat):
            for module in Path(package.__file__).parent.rglob("*.py"):
                assert "advisory" not in module.read_text(), module

    def test_he_sees_numbers_and_task_ids_and_no_names(self, worker, superuser):
        holder = run(tasks.lingers, name := a_key())
        wait_until(lambda: is_held(superuser, name))
        with connected(STRANGER, connection.settings_dict["NAME"]) as stranger:
            sql = (
                "SELECT application_name, query FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE objid::bigint = %s AND granted"
            )
            seen = stranger.execute(sql, [key(name).objid]).fetchall()
            assert seen == [(f"pglock:{holder.id}", "<insufficient privilege>")]
            assert name in superuser.execute(sql, [key(name).objid]).fetchone()[1]
        stop(superuser, name)
        with pytest.raises(Exception, match="lost"):
            holder.get(timeout=20)

    def test_rights_on_the_functions_are_of_one_database(self, database):
        with connected(STRANGER, connection.settings_dict["NAME"]) as stranger:
            assert stranger.execute("SELECT pg_try_advisory_xact_lock(1)").fetchone() == (True,)


class TestOwner:
    def test_everything_of_ours_is_his(self, superuser):
        owners = superuser.execute(
            "SELECT DISTINCT rolname FROM pg_class JOIN pg_roles ON pg_roles.oid = relowner"
            " WHERE relname LIKE 'celery_pglock%'"
        ).fetchall()
        assert owners == [(role("owner"),)]

    @pytest.mark.parametrize("name", ["worker", "web", "operator"])
    def test_nobody_else_makes_a_table(self, database, name):
        with (
            connected(role(name), database) as session,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            session.execute("CREATE TABLE mine ()")

    @pytest.mark.parametrize("name", ["worker", "web", "operator"])
    def test_nobody_else_changes_what_was_audited(self, database, name):
        with connected(role(name), database) as session:
            for sql in ("UPDATE celery_pglock_act SET by = ''", "DELETE FROM celery_pglock_outcome"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(sql)


class TestWorker:
    @pytest.mark.parametrize(
        "task",
        [
            tasks.locks,
            tasks.locks_in_transaction,
            tasks.takes_a_slot,
            tasks.shares,
            tasks.locks_strictly,
            tasks.is_critical,
        ],
    )
    def test_every_kind_of_lock_is_taken(self, worker, task):
        assert result(task, a_key()) == "done"

    def test_a_skip_is_counted(self, worker, superuser):
        name = a_key()
        with taken(superuser, name):
            assert result(tasks.locks, name) == "skipped"
        count = superuser.execute("SELECT count FROM celery_pglock_skipcount WHERE key = %s", [name])
        assert count.fetchall() == [(1,)]

    def test_a_report_has_nothing_unread_is_kept_and_takes_the_place_of_what_is_old(self, worker, superuser):
        superuser.execute(
            "INSERT INTO celery_pglock_lockreport (at, held, waiting, findings, unread)"
            " VALUES ('2020-01-01', 0, 0, '[]', '[]')"
        )
        counts = ("celery_pglock_skipcount", "celery_pglock_losscount")
        for table in counts:
            superuser.execute(
                f"INSERT INTO {table} (key, task_name, hour, count) VALUES ('k', 't', '2020-01-01', 1)"
            )
        assert result(report_locks)["unread"] == []
        reports = superuser.execute("SELECT count(*), min(at) > '2021-01-01' FROM celery_pglock_lockreport")
        assert reports.fetchone() == (1, True)
        for table in counts:
            assert not superuser.execute(f"SELECT FROM {table} WHERE hour < '2021-01-01'").fetchall()
        superuser.execute("DELETE FROM celery_pglock_lockreport")

    def test_who_is_in_the_way_of_a_critical_task_is_stopped_and_comes_back(self, worker, superuser):
        holder, critical = in_the_way(superuser)
        summary = clear_the_way(superuser)
        assert [one["task_id"] for one in summary["stopped"]] == [holder.id]
        assert critical.get(timeout=20) == holder.get(timeout=20) == "done"

    @pytest.mark.parametrize(
        ("right", "task", "denied"),
        [
            ("SELECT ON celery_pglock_keystate", tasks.locks_strictly, "table celery_pglock_keystate"),
            ("INSERT ON celery_pglock_keystate", tasks.locks_strictly, "table celery_pglock_keystate"),
            ("UPDATE ON celery_pglock_keystate", tasks.locks_strictly, "table celery_pglock_keystate"),
            ("USAGE ON SEQUENCE celery_pglock_token", tasks.locks_strictly, "sequence celery_pglock_token"),
            (
                "EXECUTE ON FUNCTION pg_try_advisory_lock(bigint)",
                tasks.locks,
                "function pg_try_advisory_lock",
            ),
            (
                "EXECUTE ON FUNCTION pg_try_advisory_xact_lock(bigint)",
                tasks.locks_in_transaction,
                "function pg_try_advisory_xact_lock",
            ),
        ],
    )
    def test_a_lock_without_its_right_fails_the_task_which_names_it(
        self, worker, superuser, right, task, denied
    ):
        with without(superuser, "worker", right), pytest.raises(Exception, match=f"denied for {denied}"):
            result(task, a_key())
        assert result(task, a_key()) == "done"

    @pytest.mark.parametrize(
        "right",
        [
            "SELECT ON celery_pglock_keystate",
            "UPDATE ON celery_pglock_keystate",
            "USAGE ON SEQUENCE celery_pglock_token",
        ],
    )
    def test_a_worker_with_strict_tasks_does_not_start_without_their_rights(self, database, superuser, right):
        variables = {**environment("worker", database), "TASKS": "role_tasks"}
        with (
            without(superuser, "worker", right),
            pytest.raises(AssertionError) as failure,
            running_worker("refused", **variables),
        ):
            pass
        assert (
            "the role of alias 'default' may not: it needs SELECT, INSERT, UPDATE ON celery_pglock_keystate, "
            "USAGE ON SEQUENCE celery_pglock_token." in str(failure.value)
        )

    @pytest.mark.parametrize("right", ["SELECT", "INSERT", "UPDATE"])
    def test_without_the_rights_to_count_a_task_is_skipped_and_a_warning_names_them(
        self, worker, superuser, right
    ):
        name, before = a_key(), worker.log.count("Nothing is counted")
        with taken(superuser, name), without(superuser, "worker", f"{right} ON celery_pglock_skipcount"):
            assert result(tasks.locks, name) == "skipped"
            wait_until(lambda: worker.log.count("Nothing is counted") == before + 1)
        line = lines_with(worker, "Nothing is counted")[-1]
        assert "'default' needs SELECT, INSERT and UPDATE on celery_pglock_skipcount" in line
        assert "Traceback" not in worker.log[worker.log.index("Nothing is counted") :]

    @pytest.mark.parametrize(
        ("right", "unread"),
        [
            ("INSERT ON celery_pglock_lockreport", "the report is not in the history"),
            ("UPDATE ON celery_pglock_lockreport", "what is old stays in celery_pglock_lockreport"),
            ("SELECT ON celery_pglock_skipcount", "the counts of skips"),
        ],
    )
    def test_a_report_tells_what_it_may_not_do(self, worker, superuser, right, unread):
        with without(superuser, "worker", right):
            told = result(report_locks)["unread"]
        table = right.rpartition(" ")[2]
        assert f"{unread}: permission denied for table {table}" in told

    @pytest.mark.parametrize("view", ["celery_pglock_pglock", "celery_pglock_pgactivity"])
    def test_without_the_views_a_report_fails_and_names_them(self, worker, superuser, view):
        with (
            without(superuser, "worker", f"SELECT ON {view}"),
            pytest.raises(Exception, match=f"permission denied for view {view}"),
        ):
            result(report_locks)

    def test_where_the_audit_cannot_be_written_nobody_is_stopped(self, worker, superuser):
        holder, critical = in_the_way(superuser)
        with without(superuser, "worker", "INSERT ON celery_pglock_act"):
            (tried,) = clear_the_way(superuser)["stopped"]
        assert tried["tries"] == []
        assert "permission denied for table celery_pglock_act" in tried["errors"][0]
        assert clear_the_way(superuser)["stopped"]
        assert critical.get(timeout=20) == holder.get(timeout=20) == "done"

    def test_a_task_that_may_not_read_the_audit_fails_when_it_is_stopped_and_the_log_says_why(
        self, worker, superuser
    ):
        holder, critical = in_the_way(superuser)
        with without(superuser, "worker", "SELECT ON celery_pglock_outcome"):
            clear_the_way(superuser)
            assert critical.get(timeout=20) == "done"
            with pytest.raises(Exception, match="lost"):
                holder.get(timeout=20)
        line, *_ = lines_with(worker, f"Whether task {holder.id} was stopped")
        assert "WARNING" in line
        assert "(GRANT SELECT ON celery_pglock_act, celery_pglock_outcome lets it): permission denied" in line


def in_the_way(superuser):
    """A task that holds a key, and a critical one that waits for it."""
    name = a_key()
    holder = run(tasks.lingers, name)
    wait_until(lambda: is_held(superuser, name))
    critical = run(tasks.is_critical, name)
    wait_until(lambda: is_held(superuser, name, granted=False))
    return holder, critical


def is_held(superuser, name, *, granted=True):
    sql = (
        "SELECT FROM pg_locks WHERE granted = %s AND (granted OR waitstart IS NOT NULL)"
        " AND (objsubid, classid::bigint, objid::bigint) = (%s, %s, %s)"
    )
    found = key(name)
    return (
        superuser.execute(sql, [granted, found.objsubid, found.classid, found.objid]).fetchone() is not None
    )


def stop(superuser, name):
    """End the session that holds this key."""
    superuser.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE objid::bigint = %s AND granted",
        [key(name).objid],
    )


def clear_the_way(superuser):
    return prioritize_critical_tasks.apply_async(kwargs={"min_wait": 0, "grace": 0}, queue="roles").get(
        timeout=20
    )


class TestWeb:
    def test_a_view_takes_locks(self, database):
        assert python("web", database, "-c", LOCK_IN_A_VIEW).stdout == "True\n"

    def test_the_pages_of_the_admin_are_shown(self, database, superuser, monkeypatch):
        monkeypatch.delenv("WITHOUT_THE_ADMIN", raising=False)
        migrated = manage("owner", database, "migrate", "-v0")
        assert not migrated.returncode, migrated.stderr
        superuser.execute(
            "INSERT INTO auth_user (password, is_superuser, username, first_name, last_name, email, is_staff,"
            " is_active, date_joined) VALUES ('', true, 'a', '', '', '', true, true, now())"
        )
        superuser.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE ON auth_user, django_session, django_content_type,"
            f" auth_permission TO {role('web')}"
        )
        pages = ("pglock", "blockedpglock", "lockreport", "act")
        shown = python("web", database, "-c", LOOK_AT_THE_ADMIN, *pages)
        assert shown.stdout.splitlines() == ["200 False"] * 4, shown.stderr


class TestOperator:
    def test_sees_who_holds_a_key_and_stops_him(self, worker, database, superuser):
        holder = run(tasks.lingers, name := a_key())
        wait_until(lambda: is_held(superuser, name))
        why = manage("operator", database, "pglock", "--why", name)
        assert (why.returncode, f"held by tests.role_tasks.lingers [{holder.id}]" in why.stdout) == (3, True)
        stopping = ("pglock", "-f", f"name={name}", "--terminate", "--yes", "--json")
        stopped = manage("operator", database, *stopping)
        (outcome,) = json.loads(stopped.stdout)
        assert (stopped.returncode, outcome["outcome"]) == (0, "terminated")
        audited = superuser.execute("SELECT role, through FROM celery_pglock_act ORDER BY id DESC LIMIT 1")
        assert audited.fetchone() == (role("worker"), "command")
        with pytest.raises(Exception, match="lost"):
            holder.get(timeout=20)

    @pytest.mark.parametrize("right", ["pg_read_all_stats", "pg_signal_backend"])
    def test_without_either_of_its_two_memberships_stops_nobody_and_is_told(
        self, worker, database, superuser, right
    ):
        holder = run(tasks.lingers, name := a_key())
        wait_until(lambda: is_held(superuser, name))
        with without(superuser, "operator", right):
            found = key(name)
            numbers = ("-f", f"classid={found.classid}", "-f", f"objid={found.objid}")
            stopped = manage("operator", database, "pglock", *numbers, "--terminate", "--yes", "--json")
        (outcome,) = json.loads(stopped.stdout)
        assert (stopped.returncode, outcome["outcome"]) == (3, "not permitted")
        assert is_held(superuser, name)
        stop(superuser, name)
        with pytest.raises(Exception, match="lost"):
            holder.get(timeout=20)

    def test_a_member_of_the_workers_role_needs_neither(self, worker, database, superuser):
        holder = run(tasks.lingers, name := a_key())
        wait_until(lambda: is_held(superuser, name))
        superuser.execute(f"GRANT {role('worker')} TO {role('operator')}")
        stopping = ("pglock", "-f", f"name={name}", "--terminate", "--yes")
        with (
            without(superuser, "operator", "pg_read_all_stats"),
            without(superuser, "operator", "pg_signal_backend"),
        ):
            assert manage("operator", database, *stopping).returncode == 0
        superuser.execute(f"REVOKE {role('worker')} FROM {role('operator')}")
        with pytest.raises(Exception, match="lost"):
            holder.get(timeout=20)


class TestBroker:
    def test_no_message_changes_the_options_of_a_lock(self, worker, superuser):
        name = a_key()
        given = {"lock_key": "another", "lock_side_effect": "Raise", "lock_limit": 2, "lock_timeout": 50}
        with taken(superuser, name):
            sent = tasks.locks.apply_async([name], queue="roles", headers=given, **given)
            assert sent.get(timeout=20) == "skipped"

    def test_a_message_that_says_it_was_stopped_for_a_critical_task_is_not_skipped(self, worker, superuser):
        name = a_key()
        with taken(superuser, name):
            sent = tasks.locks.apply_async([name], queue="roles", headers={PREEMPTED: True})
            wait_until(lambda: sent.state == "RETRY")
        assert sent.get(timeout=20) == "done"


@pytest.mark.django_db(transaction=True)
class TestTexts:
    def test_without_names_keys_are_in_errors_and_counts_and_not_in_the_server(self, rival, pglock_settings):
        pglock_settings(SHOW_NAMES=False)
        sql = "SELECT query FROM pg_stat_activity WHERE application_name LIKE 'pglock%%'"
        with advisory("patient 42"):
            assert "patient" not in rival.ask(sql)
        rival.take("patient 42")
        assert tasks.locks.apply(["patient 42"]).get() == "skipped"
        assert SkipCount.objects.get().key == "patient 42"
        with pytest.raises(LockNotAcquired, match="patient 42"):
            advisory("patient 42", timeout=0, side_effect=Raise()).acquire()
