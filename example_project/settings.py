"""The Django settings, with those of Celery and celery_pglock among them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dj_database_url

from celery_pglock.schedules import beat_entries

SECRET_KEY = "an example has no secrets"
USE_TZ = True
TIME_ZONE = "UTC"
INSTALLED_APPS = [
    "celery_pglock",
    "example_project.shop",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
ROOT_URLCONF = "example_project.urls"
STATIC_URL = "static/"
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": dj_database_url.config(default="postgresql://postgres@127.0.0.1:5432/postgres"),
    # The same database by a second connection: what the journal says outlives a task's ROLLBACK.
    "journal": dj_database_url.config(default="postgresql://postgres@127.0.0.1:5432/postgres"),
}

# Without locks the same work goes wrong, and the example says so.
CELERY_PGLOCK = {
    "ENABLED": not os.environ.get("EXAMPLE_WITHOUT_LOCKS"),
    # What would be minutes elsewhere.
    "HELD_AFTER": 3,
    "WAITING_AFTER": 1,
}

OPERATIONS = "example_project_operations"
CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_RESULT_BACKEND = CELERY_BROKER_URL
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, object] = {}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_DEFAULT_QUEUE = "example_project"
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_BEAT_SCHEDULE: dict[str, Any] = {
    "nightly report": {"task": "nightly_report", "schedule": 2.0},
    # To a queue, and so a worker, of their own: those of the shop may all be busy waiting.
    **beat_entries(report_locks=3, prioritize_critical_tasks=1, queue=OPERATIONS),
}
CELERY_BEAT_SCHEDULE["celery_pglock.prioritize_critical_tasks"]["kwargs"] |= {"min_wait": 0.5, "grace": 0.5}

if CELERY_BROKER_URL.startswith("filesystem:"):
    folder = Path(urlsplit(CELERY_BROKER_URL).path)
    for name in ("queues", "control", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # Files do not expire by themselves; without this, beat would send a task that cleans them up.
    CELERY_RESULT_EXPIRES = None
    CELERY_RESULT_BACKEND = f"file://{folder / 'results'}"
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        "data_folder_in": str(folder / "queues"),
        "data_folder_out": str(folder / "queues"),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.2,  # seconds
    }
