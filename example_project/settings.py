"""The Django settings, with those of Celery and celery_pglock among them."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import dj_database_url

SECRET_KEY = "an example has no secrets"
USE_TZ = True
TIME_ZONE = "UTC"
INSTALLED_APPS = ["celery_pglock", "example_project.shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": dj_database_url.config(default="postgresql://postgres@127.0.0.1:5432/postgres"),
    # The same database by a second connection: what the journal says outlives a task's ROLLBACK.
    "journal": dj_database_url.config(default="postgresql://postgres@127.0.0.1:5432/postgres"),
}

# Without locks the same work goes wrong, and the example says so.
CELERY_PGLOCK = {"ENABLED": not os.environ.get("EXAMPLE_WITHOUT_LOCKS")}

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")
CELERY_RESULT_BACKEND = CELERY_BROKER_URL
CELERY_BROKER_TRANSPORT_OPTIONS: dict[str, object] = {}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_DEFAULT_QUEUE = "example_project"
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_BEAT_SCHEDULE = {
    "nightly report": {"task": "nightly_report", "schedule": 2.0},
}

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
