"""What is uploaded can be built again byte by byte, and works where nothing else is installed."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from ctypes.util import find_library
from email import message_from_bytes, policy
from importlib import metadata
from pathlib import Path

import pytest

import celery_pglock
from tests.documents import PAGES

pytest.importorskip("readme_renderer", reason="pip install 'celery-pglock[dev]'")

from packaging.requirements import Requirement
from readme_renderer import markdown

ROOT = Path(__file__).parent.parent
SITE = "https://celery-pglock.readthedocs.io/en/latest/"
# What no release needs, and what others may be writing while it is copied.
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", ".nox", ".*_cache", ".hypothesis", "build", "dist")

# Which 'psycopg[binary]' has in it.
with_libpq = pytest.mark.skipif(
    find_library("pq") is None, reason="bare psycopg needs libpq: apt-get install libpq5"
)

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def built(tree, out, **environment):
    """Both archives, each from the tree."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", out, tree]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return out


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def digests(folder):
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.iterdir()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    tree = tmp_path_factory.mktemp("here") / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return built(tree, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def sdist_tree(dist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return only(folder, "*")


@pytest.fixture(scope="module")
def description(dist):
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(wheel.read(name), policy=policy.default)


@pytest.fixture(scope="module")
def empty_python(dist, tmp_path_factory):
    """The Python of an environment in which there is the wheel, and what it pulled in."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, only(dist, "*.whl")], check=True, cwd=folder)
    return python


def run_outside(python, code):
    """What the code prints, with nothing of this project in reach."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DJANGO"))
    }
    done = subprocess.run(
        [python, "-c", code], check=False, capture_output=True, text=True, cwd="/", env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestArchives:
    def test_they_are_the_same_whenever_wherever_and_by_whomever_they_are_built(self, dist, tmp_path):
        tree = tmp_path / "another" / "folder"
        before = os.umask(0o077)
        try:
            shutil.copytree(ROOT, tree, ignore=NOT_COPIED, copy_function=shutil.copy)
            for number, path in enumerate(sorted(tree.rglob("*"))):
                os.utime(path, (number, number))
                if path.is_file():
                    path.chmod(path.stat().st_mode & 0o700)
            again = built(tree, tmp_path / "dist", TZ="Pacific/Kiritimati", LC_ALL="C")
        finally:
            os.umask(before)
        assert digests(again) == digests(dist)

    def test_the_wheel_from_the_sdist_is_the_one_from_the_tree(self, dist, sdist_tree, tmp_path):
        from_sdist = only(built(sdist_tree, tmp_path / "dist"), "*.whl")
        assert from_sdist.read_bytes() == only(dist, "*.whl").read_bytes()

    def test_the_wheel_has_the_package_and_the_plugin_and_nothing_else(self, dist):
        tracked = {
            path.relative_to(ROOT).as_posix()
            for path in [ROOT / "pytest_celery_pglock.py", *(ROOT / "celery_pglock").rglob("*")]
            if path.is_file() and path.suffix != ".pyc"
        }
        names = set(zipfile.ZipFile(only(dist, "*.whl")).namelist())
        of_the_wheel = {name for name in names if ".dist-info/" in name}
        assert names - of_the_wheel == tracked
        assert {Path(name).suffix for name in tracked} == {".py", ".html", ".css", ".typed"}
        assert any(name.endswith("/licenses/LICENSE") for name in of_the_wheel)

    def test_the_sdist_has_what_it_takes_to_test_it_and_no_rubbish(self, sdist_tree):
        names = {path.relative_to(sdist_tree).as_posix() for path in sdist_tree.rglob("*") if path.is_file()}
        needed = ["Makefile", "LICENSE", "CHANGELOG.md", "setup.cfg", "noxfile.py", "tests/conftest.py"]
        needed += [".dockerignore", "example_project/servers.py"]
        needed += [page.relative_to(ROOT).as_posix() for page in PAGES]
        assert not set(needed) - names
        rubbish = re.compile(r"\.pyc$|(^|/)(\.venv|\.git/|\.nox|\.\w+_cache|build/|dist/)|_build/|~$")
        assert not [name for name in names if rubbish.search(name)]


class TestMetadata:
    def test_no_link_of_the_description_leads_nowhere(self, description):
        rendered = markdown.render(description.get_content())
        assert rendered is not None
        links = re.findall(r'(?:href|src)="([^"]*)"', rendered)
        assert len(links) > 20
        # Those to headings are made by what renders it.
        assert not [link for link in links if not link.startswith(("https://", "#"))]
        assert not [link for link in links if link.startswith(SITE) and ".md" in link]

    def test_each_link_to_the_documentation_has_a_page(self, description):
        pages = set(re.findall(rf"\({re.escape(SITE)}([\w/-]+)\.html", description.get_content()))
        at_the_root = {"security", "changelog", "contributing"}
        assert not {page for page in pages - at_the_root if not (ROOT / "docs" / f"{page}.md").exists()}

    def test_the_description_has_nothing_of_what_tests_the_readme(self, description):
        assert "invisible-code-block" not in description.get_content()
        assert "from tests" not in description.get_content()

    def test_the_version_is_everywhere_the_same(self, dist, description):
        version = celery_pglock.__version__
        assert description["Version"] == version
        assert only(dist, "*.whl").name.startswith(f"celery_pglock-{version}-")
        assert only(dist, "*.tar.gz").name == f"celery_pglock-{version}.tar.gz"
        assert metadata.version("celery-pglock") == version, "run pip install -e . again"

    def test_the_changelog_has_an_entry_for_the_version(self):
        headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert celery_pglock.__version__ in headings

    def test_twine_finds_no_fault(self, dist):
        command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
        subprocess.run(command, check=True, capture_output=True)


class TestWhereNothingElseIsInstalled:
    def test_only_what_is_declared_is_pulled_in_and_what_that_needs(self, empty_python):
        code = """
import json
from importlib.metadata import distributions
print(json.dumps({one.name: one.requires or [] for one in distributions()}))
"""
        requires = {
            canonical(name): found for name, found in json.loads(run_outside(empty_python, code)).items()
        }
        needed, left = set(), {("celery-pglock", "")}
        while left:
            name, extra = left.pop()
            needed.add(name)
            for one in map(Requirement, requires[name]):
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    left |= {(canonical(one.name), asked) for asked in {"", *one.extras}}
                    left = {pair for pair in left if pair[0] not in needed or pair[1]}
        assert set(requires) == needed
        declared = {canonical(Requirement(one).name) for one in requires["celery-pglock"] if ";" not in one}
        assert declared == {"celery", "click", "django", "psycopg"}
        assert not needed & {"redis", "psycopg-binary", "psycopg-pool", "gevent", "pytest"}

    @with_libpq
    def test_it_can_be_imported_without_settings(self, empty_python):
        run_outside(empty_python, "import celery_pglock as p; assert all(map(p.__dict__.get, p.__all__))")

    @with_libpq
    def test_its_command_can_be_found_by_celery(self, empty_python):
        done = subprocess.run(
            [empty_python.with_name("celery"), "pglock", "--help"], capture_output=True, text=True, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        assert "tree" in done.stdout

    @with_libpq
    def test_the_project_says_which_extra_brings_a_server(self, empty_python):
        code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from example_project import servers
try:
    servers.readable_postgresql("18", Path("/"))
except SystemExit as error:
    print(error)
"""
        assert "pip install 'celery-pglock[example]'" in run_outside(empty_python, code)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
