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

from celery import Celery, current_app
from celery.bin.base import CLIContext
from celery.bin.celery import celery as celery_command
from django.core.management import execute_from_command_line, get_commands, load_command_class
from django.test.utils import override_settings
from packaging.requirements import Requirement
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

import celery_pglock.tasks  # noqa: F401 - beat's entries name its tasks
from celery_pglock import install
from celery_pglock.checks import settings_can_work
from tests.celery_app import app as celery_app

ROOT = Path(__file__).parent.parent
# In folders that are not hidden: pytest's cache has a README of its own.
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("[!.]*/README.md"),
        *ROOT.glob("[!.]*/*/README.md"),
    ]
)

# What is another whenever it is shown. An id or a process that is shown twice is the same one both times, and
# two that are shown are two.
VARYING = re.compile(
    r"(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{4}…)"
    r"|(?P<time>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?: UTC)?)"
    r"|(?P<duration>\b\d+:\d\d:\d\d(?:\.\d+)?)"
    r"|(?P<host>(?<=\w@)[\w.-]+)"
    r"|(?P<child>ForkPoolWorker-\d+)"
    r"|(?P<fraction>\b\d+\.\d{3,})"
    r"|(?P<process>(?<![\w.])\d{4,})"
    r"|(?P<left_out>…)"
    r"|(?P<space>\s*\n\s*|[ \t]+)"
)
PATTERNS = {
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{4}…",
    "time": r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?: [A-Z]+)?",
    "duration": r"\d+:\d\d:\d\d(?:\.\d+)?",
    "host": r"[\w.-]+",
    "child": r"ForkPoolWorker-\d+",
    "fraction": r"\d+(?:\.\d+)?(?:e-\d+)?",
    "process": r"\d+",
    "left_out": r".*",
}
ALWAYS_THE_SAME = {"id", "process"}


def python_block(document: str, first_line: str) -> str:
    """The one block of Python in the document that begins with this line."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_line)]
    return block


def sql_blocks(document: str) -> list[str]:
    """All blocks of SQL in the document."""
    return re.findall(r"```sql\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def kinds_of_blocks(page: Path) -> list[str]:
    """What stands behind each opening fence."""
    fences = re.findall(r"^ *```+(.*)$", page.read_text(), re.MULTILINE)
    return [kind.strip() for kind in fences[::2]]


def links(page: Path) -> list[str]:
    """Where the page leads within the repository, relative to itself and without anchors."""
    text = re.sub(r"^ *```.*?^ *```$|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not link.startswith("http")]


def table(page: str, column: str) -> dict[str, list[str]]:
    """The rows of the tables in the page whose first column is called so, by the code in that column."""
    rows = {}
    inside = False
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            inside = False
        elif inside:
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[1:])
        inside = inside or cells[:1] == [column]
    assert rows, f"{page} has no table of {column!r}"
    return rows


def say_the_same(shown: str, real: str, known: dict[str, str]) -> bool:
    """Whether it is the same but for what is another each time; ``…`` is what was left out of a line.

    ``known`` has the real one for each id and process that was shown before, and learns those that are new.
    """
    shown = shown.strip()
    pattern, end, learned = "", 0, {}
    for found in VARYING.finditer(shown):
        kind, text = str(found.lastgroup), found[0]
        pattern += re.escape(shown[end : found.start()])
        end = found.end()
        if kind == "space":
            pattern += r"\s*\n\s*" if "\n" in text else r"[ \t]+"
        elif text in known:
            pattern += re.escape(known[text])
        elif text in learned:
            pattern += f"(?P={learned[text]})"
        elif kind in ALWAYS_THE_SAME:
            learned[text] = f"learned_{len(learned)}"
            pattern += f"(?P<{learned[text]}>{PATTERNS[kind]})"
        else:
            pattern += f"(?:{PATTERNS[kind]})"
    same = re.fullmatch(pattern + re.escape(shown[end:]), real.strip())
    if same is None:
        return False
    all_known = known | {text: same[group] for text, group in learned.items()}
    if len(set(all_known.values())) < len(all_known):
        return False
    known |= all_known
    return True


def as_known(text: str, known: dict[str, str]) -> str:
    """The text with the real ones of the ids and the processes that are known."""
    return VARYING.sub(lambda found: known.get(found[0], found[0]), text)


def follow(page: Path, names: dict[str, Any]) -> None:
    """Do what the page says, from its top to its end.

    Hidden blocks find in ``printed`` what was printed last, and in ``known`` the real ones of the ids and the
    processes that were shown.
    """
    document = DOCUMENTS.parse(page)
    namespace = document.namespace
    namespace.update(names, printed="", known={})
    for example in document.examples():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            example.evaluate()
        if out.getvalue():
            namespace["printed"] = out.getvalue()
        check_settings(namespace)
    # Celery makes tasks only then.
    namespace["app"].finalize()


def _run_console(example: Example) -> None:
    for command, shown in commands(example.parsed):
        known = example.namespace["known"]
        program, *arguments = shlex.split(as_known(command, known), comments=True)
        while re.match(r"\w+=", program):
            example.namespace["request"].getfixturevalue("monkeypatch").setenv(*program.split("=", 1))
            program, *arguments = arguments
        if program == "python":
            program, *arguments = arguments
        run = CONSOLE.get(program, _a_file_of_the_page)
        real = run(example, [program, *arguments], shown)
        assert not shown or say_the_same(shown, real, known), (
            f"{command}\nis shown with\n{shown}\nbut says\n{real}"
        )


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command with the output that is shown for it; without ``$`` there are commands alone."""
    text = text.replace("\\\n", " ")
    if not text.startswith("$ "):
        yield from ((line, "") for line in text.strip().splitlines())
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def _manage(example: Example, command: list[str], shown: str) -> str:
    """Whether the command and its options exist; it is run where output is shown."""
    if not shown:
        _, name, *arguments = command
        load_command_class(get_commands()[name], name).create_parser("manage.py", name).parse_args(arguments)
        return ""
    out = io.StringIO()
    # Exit codes are answers here.
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        contextlib.suppress(SystemExit),
    ):
        execute_from_command_line(command)
    return out.getvalue()


def _celery(example: Example, command: list[str], shown: str) -> str:
    """Whether the command and its options exist; it is run where output is shown."""
    _, *arguments = command
    if arguments[:1] == ["-A"]:
        arguments[1] = "tests.celery_app"
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if shown:
            celery_command.main(arguments, standalone_mode=False)
            return out.getvalue()
        with celery_command.make_context("celery", list(arguments)) as context:
            rest = [*context._protected_args, *context.args]
            name, found, options = celery_command.resolve_command(context, rest)
            assert found is not None
            context.obj = CLIContext(app=celery_app, no_color=True, workdir=None)
            found.make_context(name, list(options), parent=context).close()
    return ""


def _make(example: Example, command: list[str], shown: str) -> str:
    known = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word.partition("=")[0] for word in command if "=" in word} <= set(known), command
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    return ""


def _pip(example: Example, command: list[str], shown: str) -> str:
    _, install, *wanted = command
    assert install == "install"
    for one in map(Requirement, wanted):
        if one.name == "celery-pglock":
            assert one.extras <= set(metadata("celery-pglock").get_all("Provides-Extra") or ()), one
    return ""


def _a_file_of_the_page(example: Example, command: list[str], shown: str) -> str:
    known = f"```python\n# {command[0]}\n" in example.document.text
    assert known, f"{example.path}:{example.line}: nobody knows how to run {command!r}"
    return ""


CONSOLE: dict[str, Callable[[Example, list[str], str], str]] = {
    "manage.py": _manage,
    "celery": _celery,
    "make": _make,
    "pip": _pip,
}


def _run_sql(example: Example) -> None:
    """Its rows, as tuples of Python, are printed."""
    cursor = example.namespace["rival"].connection.execute(example.parsed)
    if cursor.description:
        print(*cursor, sep="\n")  # noqa: T201 - to be compared


def _compare_text(example: Example) -> None:
    """With what was printed since the last such block, mostly by a hidden one."""
    _compare(example, str.strip)


def _compare_json(example: Example) -> None:
    _compare(example, lambda text: json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False))


def _compare(example: Example, read: Callable[[str], str]) -> None:
    printed, example.namespace["printed"] = example.namespace["printed"], ""
    assert printed, f"{example.path}:{example.line}: nothing was printed"
    shown, real = read(example.parsed), read(printed)
    assert say_the_same(shown, real, example.namespace["known"]), (
        f"shown is\n{shown}\nbut printed was\n{real}"
    )


def _excerpts(document: Document) -> Iterator[Region]:
    """``<!-- excerpt: path -->`` says of the next block that it stands in a file, whose own tests run it.

    Where a line of the block is ``# ...``, something was left out.
    """
    for region in DirectiveInHTMLCommentLexer("excerpt")(document):
        yield Region(region.start, region.end, region.lexemes["arguments"].strip(), _announce)


def _announce(example: Example) -> None:
    file = ROOT / example.parsed

    def compare(block: Example) -> None:
        block.document.pop_evaluator(compare)
        text, end = file.read_text(), 0
        for part in re.split(r"^# \.\.\.\n", block.parsed, flags=re.MULTILINE):
            begin = text.find(part.strip("\n"), end)
            assert begin >= 0, f"{block.path}:{block.line}: {file} does not have\n{part}"
            end = begin + len(part.strip("\n"))

    example.document.push_evaluator(compare)


def check_settings(names: dict[str, Any]) -> None:
    """Settings that a document shows are such that the project would start with them."""
    if "CELERY_PGLOCK" in names:
        with override_settings(CELERY_PGLOCK=names["CELERY_PGLOCK"]):
            assert not settings_can_work()
    of_the_app = names["app"].conf.beat_schedule
    for app, schedule in ((current_app, names.get("CELERY_BEAT_SCHEDULE", {})), (names["app"], of_the_app)):
        for entry in schedule.values():
            task = app.tasks[entry["task"]]
            inspect.signature(task.run).bind(*entry.get("args", ()), **entry.get("kwargs", {}))
            assert entry.get("options", {}).keys() <= {"expires", "queue"}, entry
    for name in names.get("CELERY_TASK_ROUTES", ()):
        assert name in current_app.tasks, name
    if "CELERY_TASK_ANNOTATIONS" in names:
        annotated = Celery(set_as_current=False)
        annotated.conf.task_annotations = names["CELERY_TASK_ANNOTATIONS"]
        # As a worker does: an option that cannot be used is refused when its task is bound.
        install(annotated)
        assert annotated.conf.task_annotations.keys() <= annotated.tasks.keys()


def _python_parser(kind: str) -> PythonCodeBlockParser:
    parser = PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    parser.codeblock_parser = CodeBlockParser(kind, PythonEvaluator())
    return parser


DOCUMENTS = Sybil(
    [
        _python_parser("python"),
        _python_parser("pycon"),
        CodeBlockParser("console", _run_console),
        CodeBlockParser("sql", _run_sql),
        CodeBlockParser("json", _compare_json),
        CodeBlockParser("text", _compare_text),
        _excerpts,
    ]
)
