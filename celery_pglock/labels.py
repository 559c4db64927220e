"""The labels by which lock sessions tell who they are and what they hold.

A label is a hint for people: it is believed only beside a matching row of ``pg_locks``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from celery_pglock.keys import Key

# NAMEDATALEN - 1: PostgreSQL cuts application_name here.
LONGEST_APPLICATION_NAME = 63
LONGEST_NAME = 200

# The names of tasks and workers come back in every label.
MOST_TEXTS = 256

# The first second, since the epoch, that a datetime cannot tell: year 10000 in UTC.
END_OF_TIME = 253402300800

LOCK_SESSION = "pglock"
WORK_CONNECTION = "celery"

# What percent-encoding leaves as it is, as long as nothing is cut.
SAFE = re.compile(rf"[A-Za-z0-9_.~-]{{0,{LONGEST_NAME}}}")

COMMENT = re.compile(r"/\*pglock:1 ([^*]*)(\*/)?")


@dataclass(frozen=True, slots=True)
class Owner:
    """The run of a task on whose behalf a session holds its locks; all empty outside of tasks.

    ``priority`` is no part of a label: a session tells it by a marker.
    """

    task_name: str = ""
    task_id: str = ""
    worker: str = ""
    priority: int = 0


NOBODY: Final = Owner()


class Holding(NamedTuple):
    """A key in a label; ``since`` is the holder's own clock, in seconds since the epoch.

    ``None`` is for a key that the statement with the label asks for: if it is had, then since that ended.
    """

    key: Key
    since: float | None


@dataclass(frozen=True, slots=True)
class Label:
    """What a lock session says of itself."""

    owner: Owner = field(default_factory=Owner)
    holdings: tuple[Holding, ...] = ()


def application_name(kind: str, task_id: str) -> str:
    """``pglock:<task id>`` or ``celery:<task id>``, cut to what PostgreSQL keeps of it."""
    name = f"{kind}:{task_id}" if task_id else kind
    if not (name.isascii() and name.isprintable()):
        name = "".join(character if " " <= character <= "~" else "?" for character in name)
    return name[:LONGEST_APPLICATION_NAME]


def task_id_of(application_name: str) -> str:
    """The task id in an ``application_name`` of ours; empty in anybody else's."""
    kind, _, task_id = application_name.partition(":")
    return task_id if kind in (LOCK_SESSION, WORK_CONNECTION) else ""


def comment(owner: Owner, holdings: Iterable[Holding], *, show_names: bool) -> str:
    """The label as an SQL comment of one line.

    Percent-encoding leaves nothing in it that could end the comment or start a statement. It stands
    before the statement, because ``pg_stat_activity`` cuts a query's end.
    """
    return comment_after(beginning(owner), holdings, show_names=show_names)


def beginning(owner: Owner) -> str:
    """With what each label of this owner begins."""
    task, task_id, worker = encoded(owner.task_name), encoded(owner.task_id), encoded(owner.worker)
    return f"/*pglock:1 task={task} id={task_id} worker={worker}"


def comment_after(beginning: str, holdings: Iterable[Holding], *, show_names: bool) -> str:
    """The label that begins so."""
    keys = ""
    for holding in holdings:
        key = holding.key
        name = encoded(key.name) if show_names else ""
        since = "" if holding.since is None else f"{holding.since:.3f}"
        keys += f" key={key.objsubid}:{key.classid}:{key.objid}:{since}:{name}"
    return f"{beginning}{keys}*/"


def read(query: str) -> Label | None:
    """The label in a query that ``pg_stat_activity`` shows, as far as it was not cut off."""
    found = COMMENT.match(query)
    if not found:
        return None
    words = found[1].split(" ")
    if not found[2]:
        words.pop()
    texts = {"task": "", "id": "", "worker": ""}
    holdings = []
    for word in words:
        name, _, value = word.partition("=")
        if name in texts:
            texts[name] = decoded(value)
        elif name == "key" and (holding := _holding(value)):
            holdings.append(holding)
    return Label(Owner(texts["task"], texts["id"], texts["worker"]), tuple(holdings))


def _holding(text: str) -> Holding | None:
    try:
        objsubid, classid, objid, since, name = text.split(":")
        return Holding(Key(int(objsubid), int(classid), int(objid), decoded(name)), _moment(since))
    except ValueError:
        # Anybody may write a comment that only looks like ours.
        return None


def _moment(text: str) -> float | None:
    if not text:
        return None
    moment = float(text)
    if not 0 <= moment < END_OF_TIME:
        raise ValueError(text)
    return moment


def encoded(text: str) -> str:
    """A text as a label has it: percent-encoded, and cut at ``LONGEST_NAME`` bytes before."""
    # Nearly every id of a task.
    return text if SAFE.fullmatch(text) else _encoded(text[:LONGEST_NAME])


@lru_cache(MOST_TEXTS)
def _encoded(text: str) -> str:
    cut = text.encode("utf-8", "surrogatepass")[:LONGEST_NAME]
    return quote(cut.decode("utf-8", "ignore"), safe="")


def decoded(text: str) -> str:
    """The text that was encoded."""
    return unquote(text, errors="replace")
