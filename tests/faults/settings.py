"""The Django settings of the workers under fault, and of whoever sends them work."""

import os

import dj_database_url

SECRET_KEY = "faults"
USE_TZ = True
INSTALLED_APPS = ["celery_pglock", "tests.faults"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

MODE = os.environ["FAULTS_MODE"]
LEASE = float(os.environ["FAULTS_LEASE"])
JOURNAL = os.environ["FAULTS_JOURNAL"]

# Two ways to one database: faults hit the locks' way, or the other.
DATABASES = {
    "default": dj_database_url.parse(os.environ["FAULTS_WORK_URL"]),
    "locks": dj_database_url.parse(os.environ["FAULTS_LOCKS_URL"]),
}
DATABASES["default"]["OPTIONS"] = {"connect_timeout": 5}
DATABASES["locks"]["OPTIONS"] = {"connect_timeout": 3}

CELERY_BROKER_URL = os.environ["CELERY_BROKER_URL"]
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": int(os.environ["FAULTS_VISIBILITY_TIMEOUT"])}
CELERY_RESULT_BACKEND = CELERY_BROKER_URL
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1

# With these Celery itself loses no message, whoever is killed.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True

CELERY_PGLOCK = {"USING": "locks", "LEASE": LEASE, "STRICT": MODE == "strict"}
