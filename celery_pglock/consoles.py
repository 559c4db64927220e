"""What an operator asks for, is asked and is shown, whichever command he types."""

from __future__ import annotations

import getpass
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from django.db import DatabaseError, InterfaceError, connections
from django.utils import timezone

from celery_pglock import inquiries, orders
from celery_pglock.audits import acting
from celery_pglock.backends import EXPLANATIONS, Stop
from celery_pglock.config import Chosen
from celery_pglock.errors import LockMisuse
from celery_pglock.keys import Identifier
from celery_pglock.printed_texts import one_line

DONE = 0
ERROR = 1
USAGE = 2
NO = 3
INTERRUPTED = 130  # as of shells: 128 and the number of SIGINT

# A pid after --watch would be taken for its seconds.
LONGEST_WATCH = 3600.0
SHORTEST_WATCH = 0.1
CLEAR = "\033[H\033[2J"

NAMES: Final[Mapping[str, str]] = {
    "pids": "pids",
    "filters": "--filter",
    "on": "--on",
    "attributes": "--attribute",
    "blocking": "--blocking",
    "limit": "--limit",
    "expanded": "--expanded",
    "config": "--config",
    "yes": "--yes",
    "cancel": "--cancel",
    "terminate": "--terminate",
    "tree": "--tree",
    "why": "--why",
    "watch": "--watch",
    "json": "--json",
}

NOT_TOGETHER: Final[Mapping[str, Iterable[str]]] = {
    "why": [name for name in NAMES if name not in ("why", "watch", "json")],
    "tree": ("attributes", "blocking", "expanded", "cancel", "terminate"),
    "watch": ("cancel", "terminate"),
    "cancel": ("terminate",),
    "json": ("expanded",),
}

NOT_GIVEN: Final[Mapping[str, Any]] = dict.fromkeys((*NAMES, "database"))


class Refused(Exception):
    """What cannot be done, in one line, with the exit code that tells it."""

    def __init__(self, message: str, code: int = ERROR) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Console:
    """Where an operator is: ``out`` gets the data, ``err`` all else; ``door`` is the audit's word for it."""

    out: Any
    err: Any
    door: str

    def answer(self, options: Mapping[str, Any], *, may_look: bool = True, may_stop: bool = True) -> int:
        """Do what these options say, which are some of ``NOT_GIVEN``; answers the exit code.

        Raises ``Refused``. What may not stop shows those whom a configuration would stop.
        """
        options = {**NOT_GIVEN, **options}
        code = DONE
        try:
            _check_together(options)
            chosen = inquiries.asked(
                options["config"], {name: options[name] for name in Chosen.__dataclass_fields__}
            )
            if not may_stop:
                chosen = replace(chosen, cancel=False, terminate=False)
            if chosen.cancel or chosen.terminate:
                # Until it is known what became of them.
                code = NO
                code = self._stop(chosen, options)
            elif may_look:
                code = self._look(chosen, options)
            else:
                raise Refused("Nothing says how they are to be stopped: add --cancel or --terminate.", USAGE)
            self.out.flush()
        except BrokenPipeError:
            # Python would complain when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            return INTERRUPTED
        except LockMisuse as misuse:
            raise Refused(one_line(misuse)) from misuse
        except (DatabaseError, InterfaceError) as error:
            raise Refused(_of_database(error)) from error
        return code

    def _look(self, chosen: Chosen, options: Mapping[str, Any]) -> int:
        look: Callable[[], int]
        if options["why"] is not None:
            look = partial(self._why, inquiries.identifier(options["why"]), chosen, options)
        elif options["tree"]:
            look = partial(self._tree, chosen, options)
        else:
            look = partial(self._list, chosen, options)
        if options["watch"] is None:
            return look()
        return self._watch(look, _seconds(options["watch"]), chosen, options)

    def _list(self, chosen: Chosen, options: Mapping[str, Any]) -> int:
        found = inquiries.listing(chosen)
        if options["json"]:
            self._show_json(found.objects(), options)
        elif found.rows and chosen.expanded:
            self._show(found.paragraphs())
        elif found.rows:
            columns = shutil.get_terminal_size().columns if self.out.isatty() else None
            self._show(found.table(columns))
        if not found.rows:
            self._note("No waits were found." if chosen.blocking else "No locks were found.")
        self._note_what_is_missing(found.left_out, found.has_unreadable)
        return DONE

    def _tree(self, chosen: Chosen, options: Mapping[str, Any]) -> int:
        found = inquiries.forest(chosen)
        if options["json"]:
            self._show_json([tree.in_json() for tree in found.trees], options)
        else:
            self._show(found.cycles)
            self._show(line for tree in found.trees for line in tree.lines())
        if not found.trees:
            self._note("Nobody waits." if not _narrows(chosen) else "No such waits were found.")
        self._note_what_is_missing(found.left_out, found.has_unreadable)
        return DONE

    def _why(self, key: Identifier, chosen: Chosen, options: Mapping[str, Any]) -> int:
        found = inquiries.reasons(key, str(chosen.database))
        if options["json"]:
            self._show_json(found.in_json(), options)
        else:
            self._show(found.lines())
        self._note_what_is_missing(0, found.has_unreadable)
        return DONE if found.explanation.would_run else NO

    def _stop(self, chosen: Chosen, options: Mapping[str, Any]) -> int:
        _check_together({**options, "cancel": chosen.cancel, "terminate": chosen.terminate})
        order = orders.order(chosen)
        verb = "Cancel" if chosen.cancel else "Terminate"
        if order.prepared:
            self._note(
                f"{order.prepared} of these are of transactions that were prepared, which have no backend: "
                f"see pg_prepared_xacts, and end them by COMMIT PREPARED or ROLLBACK PREPARED."
            )
        if not order.targets:
            self._note(f"There is nobody to {verb.lower()}.")
            if options["json"]:
                self._show_json([], options)
            return NO if order.prepared else DONE
        for target in order.targets:
            self._note(str(target))
        if order.goes_beyond_limit:
            self._note(f"All of them are meant: the limit {chosen.limit} is only for what is shown.")
        number = len(order.targets)
        backends = "1 backend" if number == 1 else f"{number} backends"
        if not chosen.yes and not self._is_confirmed(f"{verb} {backends}? [y/N] "):
            self._note("Nothing was done.")
            return NO
        with acting(self.door, getpass.getuser()):
            outcomes = order.carry_out()
        if options["json"]:
            self._show_json([_outcome_in_json(stop) for stop in outcomes], options)
        else:
            self._show(str(stop) for stop in outcomes)
        return DONE if all(stop.is_done for stop in outcomes) and not order.prepared else NO

    def _is_confirmed(self, question: str) -> bool:
        if not (sys.stdin and sys.stdin.isatty()):
            raise Refused("Nothing was done: without a terminal nobody can be asked; confirm by --yes.")
        self._note(question, ending="")
        try:
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            self._note("")
            return False
        return answer.strip().lower() in ("y", "yes")

    def _watch(
        self, look: Callable[[], int], seconds: float, chosen: Chosen, options: Mapping[str, Any]
    ) -> int:
        try:
            while True:
                if self.out.isatty():
                    self.out.write(CLEAR)
                if not options["json"]:
                    self._show([f"{timezone.localtime():%Y-%m-%d %H:%M:%S}, every {seconds:g} s"])
                try:
                    look()
                except (DatabaseError, InterfaceError) as error:
                    self._note(_of_database(error))
                    # The next look finds out whether the server is back.
                    connections[str(chosen.database)].close()
                self.out.flush()
                time.sleep(seconds)
        except KeyboardInterrupt:
            return DONE

    def _show(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.out.write(f"{_writable(line, self.out)}\n")

    def _show_json(self, found: Any, options: Mapping[str, Any]) -> None:
        self.out.write(f"{json.dumps(found, indent=None if options['watch'] is not None else 2)}\n")

    def _note(self, text: str, ending: str = "\n") -> None:
        self.err.write(f"{_writable(text, self.err)}{ending}")
        self.err.flush()

    def _note_what_is_missing(self, left_out: int, has_unreadable: bool) -> None:  # noqa: FBT001
        if has_unreadable:
            self._note(
                "Some belongs to other roles, whose activity this one may not read: GRANT pg_read_all_stats "
                "would show it."
            )
        if left_out:
            self._note(f"{left_out} more: --limit 0 shows all.")


def _writable(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _check_together(options: Mapping[str, Any]) -> None:
    for name, others in NOT_TOGETHER.items():
        for other in others:
            if _is_given(options[name]) and _is_given(options[other]):
                raise Refused(f"{NAMES[name]} does not go together with {NAMES[other]}.", USAGE)


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], ())


def _narrows(chosen: Chosen) -> bool:
    return bool(chosen.pids or chosen.on or chosen.filters)


def _seconds(text: Any) -> float:
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = math.nan
    if not SHORTEST_WATCH <= seconds <= LONGEST_WATCH:
        raise LockMisuse(
            f"--watch takes {SHORTEST_WATCH:g} to {LONGEST_WATCH:g} seconds, not {text!r}; pids stand before "
            f"it."
        )
    return seconds


def _of_database(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return f"The database says: {one_line(first)}"


def _outcome_in_json(stop: Stop) -> dict[str, Any]:
    return {
        "pid": stop.pid,
        "outcome": stop.outcome,
        "is_done": stop.is_done,
        "explanation": EXPLANATIONS[stop.outcome],
    }
