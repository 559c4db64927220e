"""The Django settings of what is measured."""

from __future__ import annotations

import os
from typing import Any

import dj_database_url

SECRET_KEY = "benchmarks"
USE_TZ = True
INSTALLED_APPS = os.environ.get("APPS", "").split()
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": dj_database_url.config()}


def set_up(*apps: str) -> None:
    """Set up Django with these apps, unless somebody has set it up already."""
    import django
    from django.conf import settings

    if not settings.configured:
        os.environ |= {"DJANGO_SETTINGS_MODULE": __name__, "APPS": " ".join(apps)}
        django.setup()


def cursor() -> Any:
    """A cursor of Django's, connected."""
    from django.db import connection

    return connection.cursor()
