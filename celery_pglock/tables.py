"""The tables of models."""

from __future__ import annotations

import re
from typing import Any, TypeAlias

from django.apps import apps
from django.db import connections
from django.db.models import Model

from celery_pglock.errors import LockMisuse, did_you_mean

AnyModel: TypeAlias = str | type[Model] | Model
"""A model, an instance of one, or its label."""

# Django's quote_name does not look inside of a name, and passes on what is in quotes already: names that
# come out as one identifier or several, as with a schema, are what Django's own queries work with.
IDENTIFIERS = re.compile(r'"(?:[^"]|"")+"(?:\."(?:[^"]|"")+")*')


def tables_of(given: AnyModel) -> frozenset[str]:
    """The names of all tables that keep a part of the model's objects: its own, and its parents'.

    Raises ``LockMisuse`` for what has none.
    """
    found = _model(given)
    options: Any = found._meta
    if options.abstract:
        raise LockMisuse(f"{options.label} is abstract, so it has no table: name the models derived from it.")
    if options.swapped:
        raise LockMisuse(
            f"{options.label} is swapped for {options.swapped}, so it has no table: name that one."
        )
    everything: Any = (found, *options.get_parent_list())
    return frozenset(one._meta.db_table for one in everything)


def quoted(table: str, using: str) -> str:
    """The table's name as SQL quotes it."""
    name: str = connections[using].ops.quote_name(table)
    if not IDENTIFIERS.fullmatch(name):
        raise LockMisuse(
            f"The table name {table!r} is no name that Django can quote: double the quotes inside of it, "
            f"and put quotes around each of its parts."
        )
    return name


def _model(given: Any) -> type[Model]:
    if isinstance(given, str):
        return _named(given)
    found = type(given) if isinstance(given, Model) else given
    if not (isinstance(found, type) and issubclass(found, Model) and hasattr(found, "_meta")):
        raise LockMisuse(f'{given!r} is no model: use a model, an instance of one, or a label "app.Model".')
    return found


def _named(label: str) -> type[Model]:
    try:
        return apps.get_model(label)
    except (LookupError, ValueError):
        known = [one._meta.label for one in apps.get_models(include_auto_created=True, include_swapped=True)]
        raise LockMisuse(f"There is no model {label!r}.{did_you_mean(label, known)}") from None
