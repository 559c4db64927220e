"""The one text that an argument has in a key, before and after the broker.

Equal arguments have equal texts in every process: dicts and sets are sorted, tuples are lists, an enum is
its value, a model instance its label and primary key. Different types have different texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from django.db.models import Model
from django.utils.functional import Promise

MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

PLAIN = (str, int, float, Decimal, UUID, date, time, timedelta)


class UnstableText(Exception):
    """A value whose text differs from process to process; the message says why."""


def canonical_text(value: Any) -> str:
    """The typed text of a value; raises ``UnstableText`` where there is none."""
    if isinstance(value, Enum):
        return canonical_text(value.value)
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str | Promise):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, Decimal):
        return f"Decimal({_decimal_text(value)})"
    if isinstance(value, UUID | date | time | timedelta):
        return f"{_type_name(value)}({_moment_text(value)})"
    if isinstance(value, bytes | bytearray):
        return f"bytes({bytes(value).hex()})"
    if isinstance(value, Model):
        if value.pk is None:
            raise UnstableText("it is a model instance that has not been saved")
        return f"{value._meta.label}({canonical_text(value.pk)})"
    if isinstance(value, Mapping):
        # JSON turns every key of an object into a text.
        items = sorted((_json_key(key), canonical_text(item)) for key, item in value.items())
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(canonical_text, value)) + "]"
    if isinstance(value, Set):
        return "set(" + ", ".join(sorted(map(canonical_text, value))) + ")"
    if hasattr(value, "model_dump"):
        return canonical_text(value.model_dump())
    if is_dataclass(value) and not isinstance(value, type):
        named = {one.name: getattr(value, one.name) for one in fields(value)}
        return f"{type(value).__qualname__}({canonical_text(named)})"
    text = repr(value)
    if MEMORY_ADDRESS.search(text):
        raise UnstableText(f"its text holds a memory address: {text}")
    return text


def plain(value: Any) -> Any:
    """What a template renders: the value itself where its text is stable, else its canonical text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, PLAIN) and not isinstance(value, bool):
        return value
    if isinstance(value, Promise):
        return str(value)
    return canonical_text(value)


def _decimal_text(value: Decimal) -> str:
    if not value:
        return "0"
    # A context of its own, because the thread's would round.
    exact = Context(prec=max(1, len(value.as_tuple().digits)), Emin=MIN_EMIN, Emax=MAX_EMAX)
    return str(value.normalize(exact)) if value.is_finite() else str(value)


def _type_name(value: UUID | date | time | timedelta) -> str:
    kinds: tuple[type, ...] = (UUID, datetime, date, time, timedelta)
    return next(kind.__name__ for kind in kinds if isinstance(value, kind))


def _moment_text(value: UUID | date | time | timedelta) -> str:
    if isinstance(value, datetime) and value.tzinfo is not None:
        value = value.astimezone(timezone.utc)
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value)


def _json_key(key: Any) -> str:
    if isinstance(key, Enum):
        return _json_key(key.value)
    if key is None or isinstance(key, bool | float):
        return json.dumps(json.dumps(key))
    if isinstance(key, int):
        return json.dumps(int.__repr__(key))
    return canonical_text(key)
