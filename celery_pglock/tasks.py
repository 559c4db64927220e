"""The tasks, and the base classes of tasks, for ``from celery_pglock.tasks import ...``."""

from celery_pglock.task_classes import AdvisoryTask, XactAdvisoryTask

__all__ = ["AdvisoryTask", "XactAdvisoryTask"]
