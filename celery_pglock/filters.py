"""Filters of querysets as people type them: ``"wait_duration__gte=5 seconds"``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.core.exceptions import FieldError, ValidationError
from django.db.models import QuerySet

from celery_pglock.errors import LockMisuse, did_you_mean

BOOLEANS = {
    "true": True,
    "false": False,
    "t": True,
    "f": False,
    "yes": True,
    "no": False,
    "1": True,
    "0": False,
}
ARE_BOOLEAN = ("granted", "isnull")
ARE_SEVERAL = ("in", "range")


def filtered(queryset: QuerySet[Any], texts: Iterable[str]) -> Any:
    """The queryset with each of these filters; ``in`` and ``range`` take values with commas between them."""
    for text in texts:
        lookup, equals, value = text.partition("=")
        # Django before 5.2.8 takes the arguments of its own Q objects for lookups, and their texts for SQL.
        if not (lookup and equals) or lookup.startswith("_"):
            raise LockMisuse(
                f"The filter {text!r} must be LOOKUP=VALUE, such as 'wait_duration__gte=5 seconds'."
            )
        try:
            queryset = queryset.filter(**{lookup: _value(lookup, value)})
        except (FieldError, ValidationError, ValueError, TypeError) as error:
            reason = "; ".join(error.messages) if isinstance(error, ValidationError) else str(error)
            known = [field.name for field in queryset.model._meta.get_fields()]
            first = lookup.partition("__")[0]
            guess = "" if first in known else did_you_mean(first, known)
            raise LockMisuse(f"The filter {text!r} cannot be used: {reason}{guess}") from error
    return queryset


def _value(lookup: str, text: str) -> Any:
    last = lookup.removesuffix("__exact").rpartition("__")[2]
    if last in ARE_BOOLEAN:
        try:
            return BOOLEANS[text.strip().lower()]
        except KeyError:
            raise ValueError(f"{text!r} is not true or false") from None
    return text.split(",") if last in ARE_SEVERAL else text
