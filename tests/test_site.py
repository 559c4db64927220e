"""The documents as a site: whole, and telling what the code has."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from django.dispatch import Signal

import celery_pglock
from celery_pglock import config, signals, testing
from celery_pglock.durations import UNSET
from celery_pglock.task_options import OPTIONS
from tests.documents import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documents as they are published."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html"]
    done = subprocess.run([*build, ROOT / "docs", folder], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.long
class TestTheSite:
    def test_every_public_name_is_in_the_reference(self, site):
        pages = (page.read_text() for page in (site / "reference").glob("*.html"))
        described = {name for page in pages for name in re.findall(r'id="(celery_pglock\.[\w.]+)"', page)}
        public = {f"celery_pglock.{name}" for name in celery_pglock.__all__ if name != "__version__"}
        public |= {f"celery_pglock.testing.{name}" for name in testing.__all__}
        public |= {
            f"celery_pglock.signals.{name}" for name, one in vars(signals).items() if type(one) is Signal
        }
        public |= {f"celery_pglock.models.{name}" for name in ("PGLock", "BlockedPGLock", "PGActivity")}
        public |= {f"celery_pglock.tasks.{name}" for name in ("report_locks", "prioritize_critical_tasks")}
        assert public - described == set()

    def test_each_picture_is_shown(self, site):
        taken = {picture.name for picture in (ROOT / "docs/pictures").iterdir()}
        assert {picture.name for picture in (site / "_images").glob("*.png")} == taken


def rows_of(page, heading):
    """The first column of the table below a heading, and the second."""
    text = (ROOT / "docs" / page).read_text().partition(f"{heading}\n")[2]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text.partition("\n#")[0], re.MULTILINE))


def test_the_options_of_a_task_and_their_defaults_are_those_of_the_table():
    shown = rows_of("reference/options.md", "## Of a task")
    of_a_project = {
        f"lock_{name.lower()}": f'`CELERY_PGLOCK["{name}"]`'
        for name in vars(config.Settings())
        if name.isupper()
    }
    own = {"lock_key": "the task's name", "lock_by": "unset"}
    assert shown == {
        name: repr_of(default) if default is not UNSET else own.get(name) or of_a_project[name]
        for name, default in OPTIONS.items()
    }


def test_the_settings_and_their_defaults_are_those_of_the_tables():
    sections = ("## Of a project", "### Of the command", "### Of reports", "### Of prioritizing")
    shown = {}
    for section in sections:
        shown |= rows_of("reference/options.md", section)
    real = {field.name: getattr(config.Settings(), field.name) for field in fields(config.Settings)}
    assert set(shown) == set(real)
    in_words = {"SIDE_EFFECT", "ATTRIBUTES", "BLOCKING_ATTRIBUTES", "RETENTION"}
    assert {name: shown[name] for name in real if name not in in_words} == {
        name: repr_of(value) for name, value in real.items() if name not in in_words
    }


def repr_of(default):
    return f"`{default!r}`".replace("'", '"')
