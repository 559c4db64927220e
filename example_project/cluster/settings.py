"""The example's Django settings, for workers that tests kill."""

from example_project.settings import *  # noqa: F403

# What a killed worker was at is delivered again after four seconds, rather than an hour. Kombu before
# 5.7 only looks every 100 s.
CELERY_TASK_ACKS_LATE = True
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 4,
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
}
