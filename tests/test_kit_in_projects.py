"""The test kit in small projects of its users, each run by a test runner of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connection

from tests.conftest import wait_until

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "how-to" / "test-your-tasks.md"

# As an installation of the package has it.
ENTRY_POINTS = "[pytest11]\ncelery_pglock = pytest_celery_pglock\n"

pytestmark = pytest.mark.long

SETTINGS = """
import os

SECRET_KEY = "kit"
USE_TZ = True
INSTALLED_APPS = ["celery_pglock", "reports"]
DATABASES = {"default": {
    **%r,
    "ENGINE": "django.db.backends.postgresql",
    "NAME": os.environ.get("DATABASE_NAME", %r),
    "TEST": {"NAME": %r},
}}
CELERY_BROKER_URL = CELERY_RESULT_BACKEND = %r
CELERY_TASK_DEFAULT_QUEUE = "kit"
"""

CELERY = """
from celery import Celery

app = Celery("reports")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["reports"])
"""

LEAVES_LOCKS = """
import pytest

from celery_pglock import advisory
from celery_pglock.testing import lock_free

pytestmark = pytest.mark.django_db


@pytest.fixture(scope="module")
def lock_of_the_module(django_db_setup, django_db_blocker):
    with django_db_blocker.unblock(), advisory("of the module"):
        yield


def test_leaves_a_lock():
    advisory("k").acquire()


def test_would_meet_it():
    assert lock_free("k")


def test_holds_the_lock_of_its_module(lock_of_the_module):
    assert not lock_free("of the module")


def test_holds_it_still(lock_of_the_module):
    assert not lock_free("of the module")


@pytest.mark.filterwarnings("error::celery_pglock.testing.LocksLeftBehind")
def test_leaves_one_where_that_is_an_error():
    advisory("last", using="default").acquire()
"""

LEAVES_LOCKS_IN_UNITTEST = """
import os

from django.test import TestCase, TransactionTestCase

from celery_pglock import advisory
from celery_pglock.testing import close_lock_sessions, lock_free


class Leaves:
    def setUp(self):
        if "CLOSES" in os.environ:
            self.addCleanup(close_lock_sessions, self.id())

    def test_1_leaves_a_lock(self):
        advisory("k").acquire()

    def test_2_would_meet_it(self):
        self.assertTrue(lock_free("k"))


class InATestCase(Leaves, TestCase):
    pass


class InATransactionTestCase(Leaves, TransactionTestCase):
    pass
"""

WITHOUT_DJANGO = """
import sys


def test_nothing_was_imported():
    assert "pytest_celery_pglock" in sys.modules
    assert not {"celery_pglock", "celery", "django"} & sys.modules.keys()
"""


class Project:
    """A project in a folder of its own, with a database that its test runner makes and drops."""

    def __init__(self, folder):
        self.folder = folder
        # Several runs may share a server.
        self.database = f"{connection.settings_dict['NAME']}_kit"
        of_ours = connection.settings_dict
        server = {name: of_ours[name] for name in ("HOST", "PORT", "USER", "PASSWORD", "OPTIONS")}
        self.write(
            "settings.py",
            SETTINGS % (server, f"{self.database}_real", self.database, settings.CELERY_BROKER_URL),
        )
        self.write("pytest.ini", "[pytest]\nDJANGO_SETTINGS_MODULE = settings\n")
        self.write("reports/__init__.py", "from reports.celery import app\n")
        self.write("reports/celery.py", CELERY)
        self.write("reports/tests/__init__.py", "")
        self.write("installed-0.dist-info/METADATA", "Metadata-Version: 2.1\nName: installed\nVersion: 0\n")
        self.write("installed-0.dist-info/entry_points.txt", ENTRY_POINTS)

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def take_the_page(self, *but):
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
            path = re.match(r"# (\S+)\n", block)[1]
            if path not in but:
                self.write(path, block)

    def run(self, *command, **variables):
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith(("PYTEST", "COV"))
        }
        environment |= {
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            "DJANGO_SETTINGS_MODULE": "settings",
            "CELERY_BROKER_URL": settings.CELERY_BROKER_URL,
            **variables,
        }
        ended = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return ended.returncode, ended.stdout + ended.stderr

    def pytest(self, *arguments, **variables):
        return self.run("pytest", "-q", "-p", "no:cacheprovider", *arguments, **variables)

    def unittest(self, *arguments, **variables):
        return self.run("django", "test", *arguments, **variables)

    def databases(self):
        return ask("SELECT datname FROM pg_database WHERE datname LIKE %s", f"{self.database}%")

    def sessions(self):
        return ask("SELECT query FROM pg_stat_activity WHERE datname LIKE %s", f"{self.database}%")

    def has_left_nothing(self):
        return not self.databases() and not self.sessions()


def ask(sql, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return [value for (value,) in cursor.fetchall()]


@pytest.fixture
def project(tmp_path, transactional_db):
    project = Project(tmp_path)
    yield project
    for name in project.databases():
        with connection.cursor() as cursor:
            cursor.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    wait_until(project.has_left_nothing)


def test_the_package_has_this_entry_point():
    stated = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\ncelery_pglock = "pytest_celery_pglock"\n' in stated
    assert 'only-include = ["celery_pglock", "pytest_celery_pglock.py"]' in stated


def test_the_page_works_as_it_is_written(project):
    project.take_the_page()
    code, output = project.pytest("-W", "error")
    assert code == 0, output
    assert "8 passed" in output
    assert project.has_left_nothing()


def test_the_page_works_side_by_side(project):
    others = [f"reports/tests/test_with{end}.py" for end in ("_a_process", "_a_worker", "out_locks")]
    project.take_the_page(*others)
    code, output = project.pytest("-n", "2", "-W", "error::celery_pglock.testing.LocksLeftBehind")
    assert code == 0, output
    assert project.has_left_nothing()


def test_what_a_test_leaves_is_told_and_in_nobodys_way(project):
    project.write("reports/tests/test_leaves.py", LEAVES_LOCKS)
    code, output = project.pytest()
    assert "5 passed, 1 warning, 1 error" in output, output
    assert code == 1
    for test, lock in [("leaves_a_lock", "k"), ("leaves_one_where_that_is_an_error", "last")]:
        assert re.search(f"LocksLeftBehind: .*::test_{test} left locks behind, .*: '{lock}'\n", output)
    assert project.has_left_nothing()


def test_without_the_plugin_it_would_be_in_the_way(project):
    project.write("reports/tests/test_leaves.py", LEAVES_LOCKS)
    code, output = project.pytest("-p", "no:celery_pglock")
    assert code == 1
    assert "FAILED reports/tests/test_leaves.py::test_would_meet_it" in output
    assert "is being accessed by other users" in output
    assert project.databases()


def test_unittest_and_its_processes_leave_nothing(project):
    project.take_the_page()
    project.write("reports/tests/test_leaves.py", LEAVES_LOCKS_IN_UNITTEST)
    only = ["reports.tests.test_in_django", "reports.tests.test_leaves"]
    for side_by_side in ([], ["--parallel=2"]):
        code, output = project.unittest(*only, *side_by_side, CLOSES="yes")
        assert code == 0, output
        assert "Ran 5 tests" in output
        assert "InATestCase.test_1_leaves_a_lock left locks behind, which are free again now: 'k'" in output
        assert project.has_left_nothing()


def test_without_the_cleanup_they_would_not(project):
    project.write("reports/tests/test_leaves.py", LEAVES_LOCKS_IN_UNITTEST)
    code, output = project.unittest()
    assert code == 1
    assert "FAIL: test_2_would_meet_it" in output
    assert "is being accessed by other users" in output
    assert project.databases()


def test_the_plugin_imports_nothing_where_nothing_is_used(tmp_path, project):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    project.write("test_plain.py", WITHOUT_DJANGO)
    code, output = project.pytest("-p", "no:django", "test_plain.py", "-W", "error")
    assert code == 0, output
