"""The example from its beginning to its verdict.

    python -m example_project.servers -- python -m example_project.run [--seconds 20]

exits with 0 if its invariants held, 1 if one did not, and 128 and more if a signal cut it short.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import django
from django.conf import settings
from django.core.management import call_command

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")
django.setup()

from example_project import verdict  # noqa: E402 - models need Django to be set up
from example_project.celery import app  # noqa: E402
from example_project.director import Director  # noqa: E402
from example_project.display import say, table  # noqa: E402
from example_project.processes import CHILDREN, WORKERS, Processes  # noqa: E402
from example_project.scenes import SCENES  # noqa: E402
from example_project.servers import free_port  # noqa: E402
from example_project.shop.opening import MANAGER, open_office, open_shop  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m example_project.run")
    parser.add_argument("--seconds", type=float, default=20, help="how long work is sent (default: 20)")
    parser.add_argument("--serve", action="store_true", help="send work, and keep the admin up, until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="of the admin's site (default: a free one)")
    arguments = parser.parse_args()
    seconds = math.inf if arguments.serve else max(1.0, arguments.seconds)
    port = arguments.port or free_port()
    logs = Path(tempfile.mkdtemp(prefix="pglock-example-"))

    legend(seconds)
    call_command("migrate", verbosity=0)
    open_shop()
    password = open_office()
    app.control.purge()
    say(f"The admin, while it lasts: http://127.0.0.1:{port}/admin/celery_pglock/")
    say(f"Login: {MANAGER}, password: {password}")
    if arguments.serve:
        commands()
    say()
    with Processes(logs, port) as processes:
        director = Director(processes, seconds)
        is_complete = director.perform()
        is_cut_short = bool(director.stopped_by)
        if is_cut_short:
            say("\nStopping: the workers finish what they have begun.\n")
        elif not is_complete:
            say(f"\nBROKEN: a process ended by itself, or something never came to its end; see {logs}/")
    director.watcher.look()
    is_sound = verdict.show(is_complete=is_complete, is_cut_short=is_cut_short)
    where_to_look(logs)
    if not is_sound:
        return 1
    return 128 + director.stopped_by if is_cut_short else 0


def legend(seconds: float) -> None:
    say(f"A shop's back office: {len(WORKERS)} workers of {CHILDREN} processes and beat, on one PostgreSQL.")
    how_long = "Until Ctrl-C" if seconds == math.inf else f"For {seconds:g} s"
    say(f"{how_long} they are sent tasks that must not get into each other's way:\n")
    if not settings.CELERY_PGLOCK["ENABLED"]:
        say("EXAMPLE_WITHOUT_LOCKS is set, so nothing keeps them from it.\n")
    table([(f"  {scene.name}", scene.story, scene.option) for scene in SCENES])
    say()


def commands() -> None:
    """How a command in another terminal finds the servers, whose ports are others each time."""
    named = {name: os.environ.get(name, "") for name in ("DATABASE_URL", "CELERY_BROKER_URL")}
    # Whoever has named a server with a password knows how to reach it, and the terminal need not.
    known = [f"{name}={url}" for name, url in named.items() if url and not urlsplit(url).password]
    if known:
        say(f"In another terminal: export {' '.join(known)}")


def where_to_look(logs: Path) -> None:
    say("\nWhere to look:")
    table(
        [
            ("  example_project/shop/tasks.py", "the tasks, each with its lock in a line"),
            ("  example_project/shop/invariants.py", "the checks, from the data alone"),
            (f"  {logs}/", "what the workers and beat logged"),
            ("  SERVE=1 make example", "goes on until Ctrl-C, with the admin to look at"),
            ("  EXAMPLE_WITHOUT_LOCKS=1 make example", "the same work without locks: the checks fail"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
