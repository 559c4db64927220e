"""The documents as a site: whole, and telling what the code has."""

import re
import subprocess
import sys

import pytest

import celery_pglock
from celery_pglock import testing
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
        public |= {f"celery_pglock.models.{name}" for name in ("PGLock", "BlockedPGLock", "PGActivity")}
        public |= {f"celery_pglock.tasks.{name}" for name in ("report_locks", "prioritize_critical_tasks")}
        assert public - described == set()

    def test_each_picture_is_shown(self, site):
        taken = {picture.name for picture in (ROOT / "docs/pictures").iterdir()}
        assert {picture.name for picture in (site / "_images").glob("*.png")} == taken
