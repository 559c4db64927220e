"""The documents, and the code that they show."""

import contextlib
import doctest
import inspect
import io
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from celery import current_app
from celery.bin.celery import celery as celery_command
from django.core.management import execute_from_command_line
from django.test.utils import override_settings
from packaging.requirements import Requirement
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import celery_pglock.tasks  # noqa: F401 - beat's entries name its tasks
from celery_pglock import config

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
)

# What is another whenever a document's commands are run: ids, times, numbers, hosts, widths of columns.
VARYING = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{4}…", "<id>"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*(\+00:00)?( UTC)?", "<time>"),
    (r"(\w+)@[\w.-]+", r"\1@<host>"),
    (r"\d+(:\d\d)+(\.\d+)?", "<duration>"),
    (r"(?<![\w.])\d+(\.\d+)?", "<number>"),
    (r"[─┼+│|-]{3,}", "<rule>"),
    (r"\s+", " "),
]


def python_block(document: str, first_line: str) -> str:
    """The one block of Python in the document that begins with this line."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_line)]
    return block


def kinds_of_blocks(page: Path) -> list[str]:
    """What stands behind each opening fence."""
    fences = re.findall(r"^ *```+(.*)$", page.read_text(), re.MULTILINE)
    return [kind.strip() for kind in fences[::2]]


def say_the_same(shown: str, real: str) -> bool:
    return _without_what_varies(shown) == _without_what_varies(real)


def _without_what_varies(text: str) -> list[str]:
    lines = []
    for line in text.strip().splitlines():
        for pattern, stands_for in VARYING:
            line = re.sub(pattern, stands_for, line)
        lines.append(line.strip())
    return lines


class _Forgiving(doctest.OutputChecker):
    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return say_the_same(want, got) or super().check_output(want, got, optionflags)


def _run_console(example: Example) -> None:
    for command, shown in _commands(example.parsed):
        program, *arguments = shlex.split(command)
        if program == "python":
            program, *arguments = arguments
        run = CONSOLE.get(program)
        assert run, f"{example.path}:{example.line}: nobody knows how to run {command!r}"
        real = run(arguments, shown)
        assert not shown or say_the_same(shown, real), f"{command}\nis shown with\n{shown}\nbut says\n{real}"


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command with the output that is shown for it; without ``$`` there are commands alone."""
    text = text.replace("\\\n", " ")
    if not text.startswith("$ "):
        yield from ((line, "") for line in text.strip().splitlines())
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def _manage(arguments: list[str], shown: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        execute_from_command_line(["manage.py", *arguments])
    return out.getvalue()


def _celery(arguments: list[str], shown: str) -> str:
    """Whether the command and its options exist; it is run where output is shown."""
    if arguments[:1] == ["-A"]:
        arguments[1] = "tests.celery_app"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if shown:
            celery_command.main(arguments, standalone_mode=False)
            return out.getvalue()
        with celery_command.make_context("celery", list(arguments)) as context:
            rest = [*context._protected_args, *context.args]
            name, command, options = celery_command.resolve_command(context, rest)
            assert command is not None
            command.make_context(name, list(options), parent=context).close()
    return ""


def _make(arguments: list[str], shown: str) -> str:
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    return ""


def _pip(arguments: list[str], shown: str) -> str:
    install, *wanted = arguments
    assert install == "install"
    for one in map(Requirement, wanted):
        if one.name == "celery-pglock":
            assert one.extras <= set(metadata("celery-pglock").get_all("Provides-Extra") or ()), one
    return ""


CONSOLE: dict[str, Callable[[list[str], str], str]] = {
    "manage.py": _manage,
    "celery": _celery,
    "make": _make,
    "pip": _pip,
}


def _run_sql(example: Example) -> None:
    with example.namespace["rival"].connection.cursor() as cursor:
        cursor.execute(example.parsed)


def _read_json(example: Example) -> None:
    json.loads(example.parsed)


def check_settings(names: dict[str, Any]) -> None:
    """Settings that a document shows are such that the project would start with them."""
    if "CELERY_PGLOCK" in names:
        with override_settings(CELERY_PGLOCK=names["CELERY_PGLOCK"]):
            config.current()
    for entry in names.get("CELERY_BEAT_SCHEDULE", {}).values():
        task = current_app.tasks[entry["task"]]
        inspect.signature(task.run).bind(*entry.get("args", ()), **entry.get("kwargs", {}))


def _python_parser() -> PythonCodeBlockParser:
    parser = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    parser.doctest_parser.evaluator.runner._checker = _Forgiving()
    return parser


DOCUMENTS = Sybil(
    [
        _python_parser(),
        CodeBlockParser("console", _run_console),
        CodeBlockParser("sql", _run_sql),
        CodeBlockParser("json", _read_json),
        SkipParser(),
    ]
)
