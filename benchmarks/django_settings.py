"""The Django settings of what is measured."""

from __future__ import annotations

import os

import dj_database_url

SECRET_KEY = "benchmarks"
USE_TZ = True
INSTALLED_APPS: list[str] = []
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": dj_database_url.parse(os.environ["DATABASE_URL"])}


def set_up() -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = __name__
    django.setup()
