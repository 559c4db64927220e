"""The words of system checks that all of them share."""

from __future__ import annotations

from django.core import checks

DOCUMENTATION = "https://celery-pglock.readthedocs.io/en/latest/"


def error(number: str, message: str, *, hint: str, obj: str) -> checks.Error:
    """What cannot work; ``obj`` names what it was found in."""
    return checks.Error(message, hint=_with_link(hint, number), obj=obj, id=f"celery_pglock.{number}")


def warning(number: str, message: str, *, hint: str, obj: str) -> checks.Warning:
    """What may not do what is meant; ``obj`` names what it was found in."""
    return checks.Warning(message, hint=_with_link(hint, number), obj=obj, id=f"celery_pglock.{number}")


def _with_link(hint: str, number: str) -> str:
    return f"{hint} See {DOCUMENTATION}reference/checks.html#{number.lower()}"
