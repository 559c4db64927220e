"""The columns of our views that are not what they are stored as."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

from django.db import models
from django.db.models.lookups import Regex

from celery_pglock import labels
from celery_pglock.durations import interval
from celery_pglock.errors import LockMisuse

CONTEXT_OF_DJANGO_PGACTIVITY = "/*pga_context="

INSIDE_OF_WORD = re.compile("([a-z])([A-Z])")

# Whole characters of a percent-encoded text.
ANYTHING = "(?:[^%]|%..)*"


class Interval(models.DurationField):  # type: ignore[type-arg]
    """A duration; filters take timedeltas, numbers of seconds, and texts such as ``"5 seconds"``."""

    def get_prep_value(self, value: Any) -> Any:
        value = super().get_prep_value(value)
        if value is None or isinstance(value, timedelta) or hasattr(value, "resolve_expression"):
            return value
        return interval(value, self.name)


class Spelled(models.CharField):  # type: ignore[type-arg]
    """A word of PostgreSQL's in capitals, as ``IDLE_IN_TRANSACTION``; filters take PostgreSQL's spelling."""

    def get_prep_value(self, value: Any) -> Any:
        value = super().get_prep_value(value)
        if not isinstance(value, str):
            return value
        return INSIDE_OF_WORD.sub(r"\1_\2", value).replace(" ", "_").upper()


class Mode(Spelled):
    """The mode of a lock: ``ACCESS_EXCLUSIVE``, which ``pg_locks`` calls ``AccessExclusiveLock``."""

    def get_prep_value(self, value: Any) -> Any:
        return super().get_prep_value(value.removesuffix("Lock") if isinstance(value, str) else value)


class LabelText(models.TextField):  # type: ignore[type-arg]
    """A text in a label, percent-encoded there; empty where none is to be believed.

    Of its lookups all but ``regex`` and ``iregex`` take the text as it is.
    """

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> str | None:
        return None if value is None else labels.decoded(value)

    def get_prep_value(self, value: Any) -> Any:
        value = super().get_prep_value(value)
        return _encoded(value) if isinstance(value, str) else value


class PartOfText(Regex):
    """A lookup of a part of a text, which begins where a character of the percent-encoded one does.

    LIKE would find the 20 of an encoded blank.
    """

    lookup_name = "regex"
    before = ""
    after = ""
    ignores_case = False

    def get_prep_lookup(self) -> str:
        if hasattr(self.rhs, "resolve_expression"):
            raise LockMisuse(f"{self.lhs.target.name} is compared by its parts with texts only.")
        cut = labels.decoded(_encoded(str(self.rhs)))
        return f"^{self.before}{''.join(map(self._character, cut))}{self.after}"

    def _character(self, character: str) -> str:
        spellings = {character}
        if self.ignores_case:
            spellings |= {character.lower(), character.upper()}
        alternatives = "|".join(sorted(labels.encoded(spelling) for spelling in spellings))
        return f"(?:{alternatives})".replace(".", r"\.")


def _encoded(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LockMisuse(f"{text!r} has a lone surrogate, which no label keeps.") from None
    return labels.encoded(text)


for lookup, before, after, ignores_case in (
    ("contains", ANYTHING, "", False),
    ("icontains", ANYTHING, "", True),
    ("startswith", "", "", False),
    ("istartswith", "", "", True),
    ("endswith", ANYTHING, "$", False),
    ("iendswith", ANYTHING, "$", True),
    ("iexact", "", "$", True),
):
    members = {"before": before, "after": after, "ignores_case": ignores_case}
    LabelText.register_lookup(type(f"PartOfText_{lookup}", (PartOfText,), members), lookup)


class Context(models.TextField):  # type: ignore[type-arg]
    """What a session says of itself in the comment before its query: our label, or django-pgactivity's.

    A dict, or ``None``. It is read here and not by PostgreSQL, so it cannot be filtered by what is in it.
    """

    def from_db_value(self, value: str | None, expression: Any, connection: Any) -> Any:
        if value is None:
            return None
        if value.startswith(CONTEXT_OF_DJANGO_PGACTIVITY):
            try:
                found = json.loads(value.removeprefix(CONTEXT_OF_DJANGO_PGACTIVITY).removesuffix("*/"))
            except (ValueError, RecursionError):
                return None
            return found if isinstance(found, dict) else None
        label = labels.read(value)
        return label and {
            "task_name": label.owner.task_name,
            "task_id": label.owner.task_id,
            "worker": label.owner.worker,
            "keys": [holding.key.name for holding in label.holdings],
        }

    def get_prep_value(self, value: Any) -> Any:
        raise LockMisuse(
            f"{self.name} cannot be filtered by its content: filter by task_name, task_id, worker or "
            f"application_name."
        )
