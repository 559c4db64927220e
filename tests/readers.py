"""Somebody who does what a page says, in a folder and terminals of his own."""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.cookiejar import CookieJar
from pathlib import Path

from tests.conftest import PATIENCE, wait_until
from tests.documents import as_known, commands, say_the_same

# A block with its language, an address to look at, or keys to press.
STEP = re.compile(
    r"^```(?P<language>\w+)\n(?P<block>.*?)^```$|<(?P<url>http://\S+)>|(?P<keys>Ctrl-C twice)",
    re.MULTILINE | re.DOTALL,
)
# What does not come back to its prompt has a terminal of its own.
SERVES = re.compile(r" (worker|runserver) ")
SERVES_NOW = re.compile(r" ready\.|Quit the server")
# A worker asks for a second Ctrl-C, a site ends by the first.
ASKS_OR_ENDS = re.compile(r"Ctrl\+C again|Quit the server")
# For any lines.
CUT = "…"


OF_THE_TESTS = (
    "BROKER_OF_",
    "CELERY_",
    "COV",
    "DATABASE_",
    "DJANGO_",
    "PYTEST_",
    "PYTHON",
    "TEST_",
    "WITHOUT_",
)


def environment_of_a_new_shell() -> dict[str, str]:
    """Nothing of the tests' own that Python, Django or Celery would heed; ``python3`` is theirs."""
    # The time zone is Django's, from the tests' settings.
    own = {name for name in os.environ if name.startswith(OF_THE_TESTS)} | {"TZ"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return {
        **environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "yes",
    }


class Terminal:
    """A shell; what it and its commands print is in a file."""

    def __init__(self, folder: Path, log: Path, environment: dict[str, str]) -> None:
        self.log_file = log
        with log.open("wb") as output:
            self.shell = subprocess.Popen(
                ["bash", "--norc"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def shows(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return pattern.search(self.log)

    def type(self, line: str) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{line}\n".encode())
        self.shell.stdin.flush()

    def run(self, command: str, seconds: float) -> tuple[str, int]:
        """What the command printed, and its exit code, which the next one finds in ``$?``."""
        before = len(self.log)
        self.type(f"{command}\n(s=$?; echo; echo prompt $s; exit $s)")
        ended = wait_until(lambda: re.search(r"\nprompt (\d+)\n", self.log[before:]), command, seconds)
        return self.log[before:][: ended.start()], int(ended[1])

    def press_ctrl_c(self) -> None:
        os.killpg(self.shell.pid, signal.SIGINT)

    def leave(self, seconds: float = PATIENCE) -> None:
        """Wait until what runs there has ended by itself."""
        assert self.shell.stdin is not None
        self.shell.stdin.close()
        self.shell.wait(seconds)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)
        with self.shell:
            pass


class Reader:
    """Follows a page from its top to its end; ``close()`` ends what still runs.

    ``psql`` runs a statement as PostgreSQL's superuser. ``known`` has, for a number or an id in the page, the
    one that is this reader's.
    """

    def __init__(
        self, folder: Path, psql: Callable[[str], object], known: dict[str, str], **variables: str
    ) -> None:
        self.folder = folder
        self.psql = psql
        self.known = dict(known)
        self.environment = {**environment_of_a_new_shell(), **variables}
        self.terminals: list[Terminal] = []
        self.site = ""
        self.first = self.another_terminal()

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.close()

    def follow(self, page: str) -> None:
        for step in STEP.finditer(page):
            if step["language"]:
                getattr(self, f"_do_{step['language']}")(step["block"])
            elif step["url"]:
                self._look_at(self._as_known(step["url"]))
            else:
                self._stop_the_others()

    def another_terminal(self) -> Terminal:
        log = self.folder.with_name(f"terminal-{len(self.terminals)}.log")
        terminal = Terminal(self.folder, log, self.environment)
        self.terminals.append(terminal)
        return terminal

    def _do_sql(self, block: str) -> None:
        for statement in block.split(";\n"):
            if statement:
                self.psql(statement)

    def _do_python(self, block: str) -> None:
        first = block.splitlines()[0]
        found = re.fullmatch(r"# ([\w/]+\.py)(, at its end)?", first)
        assert found, f"not the path of a file: {first}"
        with (self.folder / "tutorial" / found[1]).open("a" if found[2] else "w") as file:
            file.write(f"\n{self._as_known(block)}")

    def _do_console(self, block: str) -> None:
        steps = list(commands(block))
        if SERVES.search(steps[-1][0]):
            terminal = self.another_terminal()
            for command, _ in steps:
                terminal.type(self._as_known(command))
            wait_until(partial(terminal.shows, SERVES_NOW), steps[-1][0])
            return
        for number, (command, shown) in enumerate(steps):
            printed, code = self.first.run(self._as_known(command), seconds=60)
            code_is_shown = steps[number + 1 : number + 2] and steps[number + 1][0] == "echo $?"
            assert code == 0 or code_is_shown, f"{command}: exit code {code}\n{printed}"
            if shown.strip():
                self._compare(command, shown.strip("\n").split("\n"), printed.strip("\n").split("\n"))

    def _do_text(self, block: str) -> None:
        """Each line is among what the other terminals or the site show, in this order."""
        lines = block.splitlines()

        def is_there() -> bool:
            places = [terminal.log for terminal in self.terminals[1:]] + [self.site]
            return any(self._has(lines, [_words(line) for line in place.split("\n")]) for place in places)

        wait_until(is_there, f"{block}\nin\n{self.terminals[-1].log}")

    def _has(self, shown: list[str], printed: list[str]) -> bool:
        rest = iter(printed)
        return all(any(self._is(_words(line), candidate) for candidate in rest) for line in shown)

    def _compare(self, command: str, shown: list[str], printed: list[str]) -> None:
        rest = iter(printed)
        skips = False
        for line in shown:
            if line == CUT:
                skips = True
                continue
            candidates: Iterator[str] = rest if skips else iter([next(rest, "")])
            assert any(self._is(line, candidate) for candidate in candidates), (
                f"$ {command}\nshown: {line}\nprinted:\n" + "\n".join(printed)
            )
            skips = False
        assert skips or not list(rest), f"$ {command}\nprinted more:\n" + "\n".join(printed)

    def _is(self, shown: str, printed: str) -> bool:
        return say_the_same(shown, printed, self.known)

    def _as_known(self, text: str) -> str:
        return as_known(text, self.known)

    def _look_at(self, url: str) -> None:
        """Open a page of the admin, as whom the tutorial makes."""
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        form = browser.open(url).read().decode()
        token = re.search(r'csrfmiddlewaretoken" value="([^"]+)"', form)
        assert token, form
        fields = {"csrfmiddlewaretoken": token[1], "username": "admin", "password": "tutorial"}
        login = urllib.parse.urljoin(url, "/admin/login/")
        fields["next"] = urllib.parse.urlsplit(url).path
        page = browser.open(login, urllib.parse.urlencode(fields).encode()).read().decode()
        rows = page.split("</tr>")
        self.site = "\n".join(html.unescape(_words(re.sub(r"<[^>]+>", " ", row))) for row in rows)

    def _stop_the_others(self) -> None:
        for terminal in self.terminals[1:]:
            terminal.press_ctrl_c()
            wait_until(partial(terminal.shows, ASKS_OR_ENDS), "Ctrl-C was understood")
            terminal.press_ctrl_c()
            terminal.leave()


def _words(line: str) -> str:
    return " ".join(line.split())
