"""The Django settings of a beat that keeps its schedule in the database."""

import os

from celery_pglock.schedules import beat_entries
from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "django_celery_beat"]
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_SCHEDULE = beat_entries(report_locks=1, queue=os.environ.get("REPORT_QUEUE"), using="locks")
