"""The command ``celery pglock``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import django
from celery.exceptions import CeleryCommandException
from django.apps import apps
from django.conf import ENVIRONMENT_VARIABLE, settings
from django.core.exceptions import ImproperlyConfigured

from celery_pglock import inspections
from celery_pglock.printed_texts import one_line

# Every celery command loads this room, and no module of a project's: it is how ``inspect`` knows of ours.
inspections.register()

Function = TypeVar("Function", bound=Callable[..., Any])

WATCH_EVERY = "2"

PIDS = click.argument("pids", nargs=-1)
DATABASE = click.option("-d", "--database", help="Alias in DATABASES; by default CELERY_PGLOCK['USING'].")
FILTER = click.option(
    "-f", "--filter", "filters", multiple=True, metavar="LOOKUP=VALUE", help="Only locks like this."
)
ON = click.option("-o", "--on", multiple=True, metavar="MODEL", help="Only locks on this model.")
ATTRIBUTE = click.option("-a", "--attribute", "attributes", multiple=True, help="Show this.")
BLOCKING = click.option("--blocking", is_flag=True, help="Waits, each with who is in its way.")
LIMIT = click.option("-l", "--limit", metavar="N", help="Show so many; 0 shows all.")
EXPANDED = click.option("-e", "--expanded", is_flag=True, help="Show one attribute a line.")
CONFIG = click.option("-c", "--config", metavar="NAME", help="Use one of CELERY_PGLOCK['CONFIGS'].")
JSON = click.option("-j", "--json", is_flag=True, help="Show JSON.")
WATCH = click.option(
    "--watch",
    is_flag=False,
    flag_value=WATCH_EVERY,
    metavar="[SECONDS]",
    help=f"Look again and again, every {WATCH_EVERY} seconds by default, until Ctrl-C.",
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Function], Function]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.group()
def pglock(**_: Any) -> None:
    """Show who holds which lock and who waits for whom, and stop those who are in the way.

    Exit codes: 0 done; 1 an error; 2 a usage error; 3 the answer is no: the key of why is taken, or not
    everybody was stopped.
    """


@pglock.command("list")
@_with(PIDS, DATABASE, FILTER, ON, ATTRIBUTE, BLOCKING, LIMIT, EXPANDED, CONFIG, JSON, WATCH)
def list_(**options: Any) -> None:
    """Show locks, or waits, of all backends or of these."""
    _answer(options, may_stop=False)


@pglock.command()
@_with(PIDS, DATABASE, FILTER, ON, LIMIT, CONFIG, JSON, WATCH)
def tree(**options: Any) -> None:
    """Show who waits for whom, root blockers first."""
    _answer({**options, "tree": True}, may_stop=False)


@pglock.command()
@_with(click.argument("key"), DATABASE, JSON, WATCH)
def why(key: str, **options: Any) -> None:
    """Show who holds a key: a text, a number such as 42 or '(1, 2)', or a text in quotes."""
    _answer({**options, "why": key}, may_stop=False)


@pglock.command()
@_with(
    PIDS,
    DATABASE,
    FILTER,
    ON,
    BLOCKING,
    CONFIG,
    JSON,
    click.option("--cancel", is_flag=True, help="Cancel what they run."),
    click.option("--terminate", is_flag=True, help="End their sessions, which frees what they hold."),
    click.option("-y", "--yes", is_flag=True, help="Do not ask before that."),
)
def stop(**options: Any) -> None:
    """Stop the backends of these locks; with --blocking those that are in the way."""
    _answer(options, may_look=False)


def _answer(options: dict[str, Any], **allowed: bool) -> None:
    _set_up_django()
    # Its models can be imported only then.
    from celery_pglock.consoles import Console, Refused

    try:
        code = Console(sys.stdout, sys.stderr, "celery").answer(options, **allowed)
    except Refused as refused:
        raise CeleryCommandException(str(refused), refused.code) from refused
    # Click would end well what returns.
    raise SystemExit(code)


def _set_up_django() -> None:
    """Django for its models; Celery sets it up only for commands that load the tasks."""
    if not (settings.configured or os.environ.get(ENVIRONMENT_VARIABLE)):
        raise CeleryCommandException(
            f"There are no Django settings: set {ENVIRONMENT_VARIABLE}, or name by celery -A an app whose "
            f"module does.",
            1,
        )
    try:
        if not apps.ready:
            django.setup()
    except (ImportError, ImproperlyConfigured) as error:
        raise CeleryCommandException(f"Django cannot be set up: {one_line(error)}", 1) from error
    if not apps.is_installed("celery_pglock"):
        raise CeleryCommandException("'celery_pglock' is missing in INSTALLED_APPS.", 1)
