"""Values from a database as texts that do a terminal no harm."""

from __future__ import annotations

import json
import re
import textwrap
from datetime import datetime, timedelta
from typing import Any
from unicodedata import combining, east_asian_width

LINE_BREAK = re.compile(r"\s*[\n\r\t\v\f]\s*")
ELLIPSIS = "…"


def one_line(value: Any) -> str:
    """The value on one line; what could steer a terminal is shown as an escape such as ``\\x1b``."""
    return _harmless(LINE_BREAK.sub(" ", _text(value)).strip())


def lines(value: Any) -> list[str]:
    """The value with its line breaks, each line harmless; at least one line."""
    text = textwrap.dedent(_text(value).replace("\r\n", "\n").expandtabs(4)).strip()
    return [_harmless(line) for line in text.split("\n")]


def width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if combining(one) else 2 if east_asian_width(one) in "WF" else 1 for one in text)


def cut(text: str, columns: int) -> str:
    """The text, its end cut off if it takes more columns."""
    if width(text) <= columns:
        return text
    left = columns - 1
    kept = []
    for character in text:
        left -= width(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + ELLIPSIS


def in_json(value: Any) -> Any:
    """The value as JSON knows it: ISO 8601 for times, seconds for durations."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, timedelta):
        return str(timedelta(seconds=int(value.total_seconds())))
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _harmless(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
