"""The suite on combinations of versions, and the table of those on which it really ran.

    make matrix [FULL=1] [ONLY="django=6.1 celery=oldest"]

By default it runs on the oldest versions of all, and on a covering set of the others: each version, and each
pair of Python and Django, of Django and Celery, and of PostgreSQL and psycopg that can be together. What this
machine does not have is told, and left out.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import nox
import psycopg

from example_project import servers

ROOT = Path(__file__).parent
PAGE = ROOT / "docs" / "reference" / "supported.md"
BEGIN, END = "<!-- written by make matrix -->\n", "<!-- end of what make matrix writes -->\n"
RESULTS = ROOT / ".nox" / "results"

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
DJANGOS = ("5.2", "6.0", "6.1")
AGES = ("oldest", "newest")
PAIRS = (("python", "django"), ("django", "celery"), ("postgresql", "psycopg"))

OLDEST_CELERY = "celery==5.4.0"
# What was published as 3.2.0 asks for a binary package that does not exist.
OLDEST_PSYCOPG = "psycopg==3.2.1"
PYTHONS_OF_THE_OLDEST_PSYCOPG = ("3.10", "3.11", "3.12")
PYTHONS_WITHOUT_DJANGO_6 = ("3.10", "3.11")

WHAT_IS_INSTALLED = """
import json, platform
from importlib.metadata import version
print(json.dumps([platform.python_version(), *map(version, ["Django", "celery", "kombu", "psycopg"])]))
"""

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


@dataclass(frozen=True)
class Combination:
    python: str
    django: str
    celery: str
    postgresql: str
    psycopg: str

    @property
    def is_possible(self) -> bool:
        has_its_django = self.django == "5.2" or self.python not in PYTHONS_WITHOUT_DJANGO_6
        return has_its_django and (self.psycopg == "newest" or self.python in PYTHONS_OF_THE_OLDEST_PSYCOPG)

    @property
    def pairs(self) -> set[tuple[str, ...]]:
        """What of the covering set it covers."""
        versions = vars(self)
        return {(one, versions[one], other, versions[other]) for one, other in PAIRS}

    def __str__(self) -> str:
        return " ".join(f"{axis}={version}" for axis, version in vars(self).items())


# A Django without its corrections is worth one run.
OLDEST = Combination("3.10", "5.2.0", "oldest", "16", "oldest")


def chosen(pythons: Sequence[str], postgresqls: Sequence[str]) -> list[Combination]:
    """The combinations to run, of these Pythons and PostgreSQLs; ``FULL`` and ``ONLY`` say which."""
    wanted = dict(one.split("=", 1) for one in os.environ.get("ONLY", "").split())
    if unknown := wanted.keys() - vars(OLDEST).keys():
        raise SystemExit(f"ONLY knows {', '.join(vars(OLDEST))}, and not {', '.join(unknown)}.")
    product = [Combination(*one) for one in itertools.product(pythons, DJANGOS, AGES, postgresqls, AGES)]
    possible = [one for one in product if one.is_possible]
    if OLDEST.python in pythons:
        possible.insert(0, OLDEST)
    possible = [one for one in possible if wanted.items() <= vars(one).items()]
    return possible if os.environ.get("FULL") else _covering(possible)


def _covering(possible: Sequence[Combination]) -> list[Combination]:
    covering = [one for one in possible if one == OLDEST]
    left = set().union(*(one.pairs for one in possible)) - OLDEST.pairs
    while left:
        # Of those that cover as much, the newest versions come first.
        best = max(reversed(possible), key=lambda one: len(one.pairs & left))
        covering.append(best)
        left -= best.pairs
    return covering


def _pythons() -> list[str]:
    """Those that are found; pyenv's are found, too, of which its own stand-ins on the PATH know nothing."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    folders = [str(folder) for folder in sorted(pyenv.glob("*/bin"))]
    os.environ["PATH"] = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    return [python for python in PYTHONS if shutil.which(f"python{python}")]


def _postgresqls() -> list[str]:
    return [*servers.POSTGRESQL_FOLDERS, *([servers.ON_THE_PATH] if shutil.which("postgres") else [])]


HERE = _pythons()
COMBINATIONS = chosen(HERE, _postgresqls())
if not COMBINATIONS:
    raise SystemExit(f"No combination here is {os.environ.get('ONLY', '')}.")


@nox.session
@nox.parametrize(
    [field.name for field in dataclasses.fields(Combination)],
    [dataclasses.astuple(one) for one in COMBINATIONS],
    ids=[str(one).replace(" ", ",") for one in COMBINATIONS],
)
def suite(session: nox.Session, django: str, celery: str, postgresql: str, psycopg: str) -> None:
    """Run what is not long on one combination, without coverage."""
    combination = Combination(str(session.python), django, celery, postgresql, psycopg)
    kept = RESULTS / f"{combination}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    _install(session, combination)
    installed = json.loads(session.run("python", "-c", WHAT_IS_INSTALLED, silent=True) or "")
    started = time.monotonic()
    with servers.environment(postgresql) as variables:
        report = Path(session.create_tmp()) / "report.xml"
        session.run(
            *("python", "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-m", "not long"),
            *(
                "--numprocesses",
                os.environ.get("SIDE_BY_SIDE", "3"),
                "--dist",
                "loadfile",
            ),
            *(f"--junitxml={report}", *session.posargs),
            env={**variables, "PATH": _path_with_redis(variables["PATH"])},
            success_codes=range(6),
        )
        result = {
            "combination": vars(combination),
            "installed": [*installed, _server_version(variables["DATABASE_URL"])],
            **_counted(report),
            "seconds": round(time.monotonic() - started),
            "on": datetime.date.today().isoformat(),
        }
    # Some tests are not the suite that the page speaks of.
    if not session.posargs:
        kept.write_text(json.dumps(result))
    if not result["passed"] or result["failed"]:
        session.error(
            f"{result['failed']} of {result['failed'] + result['passed']} tests failed: {combination}"
        )


@nox.session(python=False)
def table(session: nox.Session) -> None:
    """Print what the runs came to, and write it into the page; what is older stays only beside ``ONLY``."""
    files = [RESULTS / f"{one}.json" for one in COMBINATIONS]
    if not os.environ.get("ONLY"):
        for stale in set(RESULTS.glob("*.json")) - set(files):
            stale.unlink()
    results = [json.loads(one.read_text()) for one in sorted(RESULTS.glob("*.json"))]
    rows = [_row(one) for one in results]
    for one in COMBINATIONS:
        if not (RESULTS / f"{one}.json").exists():
            session.warn(f"{one}: did not run")
    for python in PYTHONS:
        if python not in HERE:
            session.warn(f"Python {python} is not here")
    if not shutil.which("postgres"):
        session.warn("There is no PostgreSQL on the PATH")
    written = "".join(
        f"| {' | '.join(row)} |\n"
        for row in [HEADINGS, ("---",) * len(HEADINGS), *sorted(rows, key=_in_order)]
    )
    print(written)  # noqa: T201 - for whoever waits for it
    if session.posargs:
        session.warn("ARGS chose tests: the page stays as it is")
        return
    text = PAGE.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(f"{text[:before]}\n{written}\n{text[after:]}")


HEADINGS = ("Python", "Django", "Celery", "kombu", "psycopg", "PostgreSQL", "tests", "seconds", "on")


def _row(result: dict[str, object]) -> tuple[str, ...]:
    tests = f"{result['passed']} passed"
    if result["failed"]:
        tests += f", **{result['failed']} failed**"
    if result["skipped"]:
        tests += f", {result['skipped']} skipped"
    installed = result["installed"]
    assert isinstance(installed, list)
    return (*installed, tests, str(result["seconds"]), str(result["on"]))


def _in_order(row: tuple[str, ...]) -> list[list[int]]:
    return [[int(number) for number in re.findall(r"\d+", version)] for version in row[:6]]


def _install(session: nox.Session, combination: Combination) -> None:
    # The pip that comes with an older Python tries for hours what goes with older versions.
    session.install("--upgrade", "pip")
    celery = OLDEST_CELERY if combination.celery == "oldest" else "celery"
    psycopg = OLDEST_PSYCOPG if combination.psycopg == "oldest" else "psycopg"
    session.install("--editable", ".[test]", celery, psycopg)
    # By itself: django-celery-beat says that it does not go with the newest, and does.
    exact = combination == OLDEST
    session.install(f"Django=={combination.django}" if exact else f"Django~={combination.django}.0")


def _path_with_redis(path: str) -> str:
    """The PATH, and at its end the embedded Redis, of which not every Python has a wheel."""
    command = servers.redis_command(0, ROOT)
    return path if command is None else os.pathsep.join([path, str(Path(command[0]).parent)])


def _server_version(url: str) -> str:
    with psycopg.connect(url) as connection:
        number = connection.info.server_version
    return f"{number // 10000}.{number % 10000}"


def _counted(report: Path) -> dict[str, int]:
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for one in ElementTree.parse(report).getroot().iter("testsuite"):  # noqa: S314 - pytest wrote it
        counts = {name: number + int(one.get(name, 0)) for name, number in counts.items()}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }
