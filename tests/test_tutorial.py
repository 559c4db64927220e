"""The pages of the tutorial do what they say."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from example_project.servers import free_port
from tests.conftest import wait_until
from tests.documents import commands
from tests.readers import CUT, STEP, Reader, environment_of_a_new_shell
from tests.servers import Cluster, broker, version_of_the_tests

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
EXAMPLE = (ROOT / "docs/tutorial/example.md").read_text()


def built_wheel(folder):
    """What is installed from the package index otherwise: the code as it is here."""
    # Building may leave something beside the source.
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "dist"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("celery_pglock-*.whl")
    return wheel


@pytest.mark.timeout(240)
def test_ten_minutes_are_as_they_are_told(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"celery-pglock @ {built_wheel(tmp_path).as_uri()}\n")
    with (
        Cluster() as cluster,
        broker() as redis_url,
        psycopg.connect(cluster.url, autocommit=True) as superuser,
    ):
        ports = {"5432": cluster.port, "6379": redis_url.rsplit(":")[-1].split("/")[0], "8000": free_port()}
        known = {port: str(mine) for port, mine in ports.items()}
        # Compiling what is never imported takes a while.
        options = {"PIP_CONSTRAINT": str(constraints), "PIP_NO_COMPILE": "yes"}
        reader = Reader(folder, superuser.execute, known, **options)
        try:
            reader.follow((ROOT / "docs/tutorial/ten-minutes.md").read_text())
        finally:
            reader.close()


def blocks(language):
    return [step["block"] for step in STEP.finditer(EXAMPLE) if step["language"] == language]


def shape(line):
    """A line of the example without what is another in each run."""
    line = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", line)
    line = re.sub(r"@[\w.-]+", "@HOST", line)
    line = re.sub(r"(\d+ (done|failed|skipped|left)(, )?)+", "ENDS", line)
    # Who of a round comes first is a matter of chance, and so is whom a round is about.
    line = re.sub(r"\((acme|globex|initech|[a-z]+, [a-z]+, \d+)\)|(?<=:)[a-z]+", "NAME", line)
    return " ".join(re.sub(r"\d+", "#", line).split())


def shows(log, block):
    """Whether it has the lines of the block, in their order."""
    rest = iter([shape(line) for line in log.split("\n")])
    for line in map(shape, block.splitlines()):
        if not any(one.startswith(line[:-1]) if line.endswith(CUT) else one == line for one in rest):
            return False
    return True


def answers(terminal, block):
    """Whether the commands of the block print what is shown."""
    for command, shown in commands(block):
        printed, _ = terminal.run(command, seconds=30)
        if not shows(printed, shown):
            return False
    return True


def command_of_make(*arguments):
    """What ``make example`` runs in the end, with the programs of the tests."""
    command = ["make", "--dry-run", "--no-print-directory", "example", f"VENV={sys.prefix}"]
    command += [f"PG={version_of_the_tests()}", *arguments]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return told.replace("\\\n", " ").strip().split("\n")[-1]


def test_what_is_shown_of_the_examples_tasks_is_what_they_are():
    source = (ROOT / "example_project/shop/tasks.py").read_text()
    assert [block for block in blocks("python") if block not in source] == []


@pytest.mark.timeout(180)
def test_the_example_shows_what_is_said_of_it(tmp_path):
    start, serve, activate, *asked = blocks("console")
    assert (start, activate) == ("$ make example\n", "$ . .venv/bin/activate\n")
    reader = Reader(tmp_path, print, {})
    reader.first.type(f"cd {shlex.quote(str(ROOT))}")
    stage = reader.another_terminal()
    stage.type(f"cd {shlex.quote(str(ROOT))}; {command_of_make(serve.split()[-1])}")
    *live, verdict, _ = blocks("text")
    try:
        export = wait_until(lambda: re.search("^In another terminal: (.*)\n", stage.log, re.M), stage.log)
        reader.first.type(export[1])
        for block in live:
            wait_until(lambda block=block: shows(stage.log, block), block, seconds=60)
        for block in asked:
            wait_until(lambda block=block: answers(reader.first, block), block, seconds=60)
    finally:
        stage.press_ctrl_c()
        stage.leave(40)
        reader.close()
    assert shows(stage.log, verdict), stage.log


@pytest.mark.timeout(90)
def test_the_example_without_locks_is_found_broken():
    *_, told = blocks("text")
    environment = environment_of_a_new_shell() | {"EXAMPLE_WITHOUT_LOCKS": "1"}
    command = shlex.split(command_of_make("SECONDS=7"))
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert shows(run.stdout, told)
