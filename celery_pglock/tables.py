"""The tables of models."""

from __future__ import annotations

from typing import Any, TypeAlias

from django.apps import apps
from django.db import models

from celery_pglock.errors import LockMisuse, did_you_mean

Model: TypeAlias = models.Model | type[models.Model] | str
"""A model's class, an instance, or a label such as ``"auth.User"``."""


def tables_of(given: Model) -> tuple[str, ...]:
    """The ``db_table`` of every table that keeps a part of the model's objects: its own, and its parents'.

    Raises ``LockMisuse`` for what has none.
    """
    options: Any = _model(given)._meta
    if options.abstract:
        raise LockMisuse(
            f"{options.label} is abstract and has no table: name the models that inherit from it."
        )
    if options.swapped:
        raise LockMisuse(f"{options.label} is swapped for {options.swapped} and has no table: name that.")
    concrete: Any = options.concrete_model
    parents = concrete._meta.get_parent_list()
    return tuple(model._meta.db_table for model in (concrete, *parents) if not model._meta.proxy)


def _model(given: Model) -> type[models.Model]:
    if isinstance(given, str):
        try:
            return apps.get_model(given)
        except (LookupError, ValueError) as error:
            known = [model._meta.label for model in apps.get_models()]
            raise LockMisuse(
                f"There is no model {given!r}; a label is 'app_label.Model'.{did_you_mean(given, known)}"
            ) from error
    if isinstance(given, models.Model):
        return type(given)
    if isinstance(given, type) and issubclass(given, models.Model):
        return given
    raise LockMisuse(f"{given!r} is not a model: give its class, or its label such as 'auth.User'.")
