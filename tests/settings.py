"""The Django settings of the tests and of the workers that they start."""

import json
import os
from urllib.parse import urlsplit, urlunsplit

import dj_database_url

SECRET_KEY = "tests"
USE_TZ = True
APPS = ["celery_pglock", "tests"]
OF_THE_ADMIN = [
    f"django.contrib.{app}"
    for app in ("auth", "contenttypes", "sessions", "messages", "staticfiles", "admin")
]
# The processes that tests start do without: they are ready sooner.
if os.environ.get("WITHOUT_THE_ADMIN"):
    INSTALLED_APPS = APPS
else:
    INSTALLED_APPS = [*APPS, *OF_THE_ADMIN]
    ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
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
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_database = dj_database_url.parse(
    os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
)
# A worker works on the test database of the tests that started it.
_database["NAME"] = os.environ.get("TEST_DATABASE_NAME", _database["NAME"])
DATABASES = {
    "default": {**_database},
    # The same server by another alias.
    "locks": {**_database, "TEST": {"MIRROR": "default"}},
    "sqlite": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}

# Tests that run side by side have a database of Redis each, and a user whose rights a test may take away.
# Celery prefers the variable to the setting, also in the workers that they start.
BROKER = os.environ.setdefault(
    "BROKER_OF_ALL_TESTS", os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0")
)
CELERY_BROKER_URL = BROKER
if ROOM := os.environ.get("PYTEST_XDIST_WORKER", ""):
    _broker = urlsplit(BROKER)
    _netloc = f"{ROOM}:{ROOM}@{_broker.hostname}:{_broker.port or 6379}"
    _number = int(ROOM.removeprefix("gw")) + 1
    CELERY_BROKER_URL = urlunsplit(_broker._replace(netloc=_netloc, path=f"/{_number}"))
    os.environ["CELERY_BROKER_URL"] = CELERY_BROKER_URL
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": int(os.environ.get("VISIBILITY_TIMEOUT", "3600"))}
CELERY_RESULT_BACKEND = CELERY_BROKER_URL
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_RESULT_EXTENDED = True
CELERY_TASK_TRACK_STARTED = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

CELERY_WORKER_POOL_START_METHOD = os.environ.get("START_METHOD", "fork")
CELERY_WORKER_SEND_TASK_EVENTS = bool(os.environ.get("TASK_EVENTS"))

CELERY_PGLOCK: dict[str, object] = json.loads(os.environ.get("PGLOCK_SETTINGS", "{}"))

# A package of somebody else's, whose task is locked by what stands here alone.
if os.environ.get("THIRD_PARTY"):
    from celery_pglock import Skip

    INSTALLED_APPS = [*INSTALLED_APPS, "djcelery_email"]
    CELERY_EMAIL_BACKEND = "tests.mail.JournalBackend"
    CELERY_EMAIL_TASK_CONFIG = {"ignore_result": False, "default_retry_delay": 0}
    CELERY_TASK_ANNOTATIONS = {
        "djcelery_email_send_multiple": {"lock_key": "mail", "lock_side_effect": Skip("skipped")},
        "annotated": {"lock_key": "by annotation"},
        "anotated": {"lock_key": "in vain"},
    }

if _every := os.environ.get("REPORT_EVERY"):
    from celery_pglock.schedules import beat_entries

    CELERY_BEAT_SCHEDULE = beat_entries(report_locks=float(_every), queue=os.environ["REPORT_QUEUE"])
