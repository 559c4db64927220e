"""The command ``manage.py pglock``."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from celery_pglock.consoles import DONE, Console, Refused

EPILOG = (
    "Exit codes: 0 done; 1 an error; 2 a usage error; 3 the answer is no: the key of --why is taken, or not "
    "everybody was stopped."
)

WATCH_EVERY = "2"


class Plain:
    """A stream of Django's, to which nothing adds a colour or the end of a line."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._stream.write(text, str, "")


class Command(BaseCommand):
    help = "Shows who holds which lock and who waits for whom, and stops those who are in the way."

    # An operator looks when something is broken: that must not keep him from looking.
    requires_system_checks: list[str] = []  # noqa: RUF012 - as Django has it

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, epilog=EPILOG, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("pids", nargs="*", help="only these backends")
        parser.add_argument("-d", "--database", help="alias in DATABASES (default: CELERY_PGLOCK['USING'])")
        parser.add_argument(
            "-f",
            "--filter",
            action="append",
            dest="filters",
            metavar="LOOKUP=VALUE",
            help="only locks like this, such as 'wait_duration__gte=5 seconds'; several must all hold",
        )
        parser.add_argument(
            "-o", "--on", action="append", metavar="MODEL", help="only locks on this model, such as auth.User"
        )
        parser.add_argument(
            "-a", "--attribute", action="append", dest="attributes", help="show this, such as activity__state"
        )
        parser.add_argument("--blocking", action="store_true", help="show waits, each with who is in its way")
        parser.add_argument("-l", "--limit", metavar="N", help="show so many; 0 shows all")
        parser.add_argument("-e", "--expanded", action="store_true", help="show one attribute a line")
        parser.add_argument("-c", "--config", metavar="NAME", help="use one of CELERY_PGLOCK['CONFIGS']")
        parser.add_argument(
            "--tree", action="store_true", help="show who waits for whom, root blockers first"
        )
        parser.add_argument(
            "--why",
            metavar="KEY",
            help="show who holds this key: a text, a number such as 42 or '(1, 2)', or a text in quotes",
        )
        parser.add_argument(
            "--watch",
            nargs="?",
            const=WATCH_EVERY,
            metavar="SECONDS",
            help=f"look again and again, every {WATCH_EVERY} seconds by default, until Ctrl-C",
        )
        parser.add_argument("--json", action="store_true", help="show JSON")
        parser.add_argument(
            "--cancel",
            action="store_true",
            help="cancel what their backends (--blocking: who is in the way) run",
        )
        parser.add_argument(
            "--terminate",
            action="store_true",
            help="end their backends; with --blocking those that are in the way",
        )
        parser.add_argument("-y", "--yes", action="store_true", help="do not ask before that")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            code = Console(Plain(self.stdout), Plain(self.stderr), "command").answer(options)
        except Refused as refused:
            raise CommandError(str(refused), returncode=refused.code) from refused
        if code != DONE:
            raise SystemExit(code)
