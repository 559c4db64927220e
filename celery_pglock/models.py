"""What is kept about locks in tables of their own."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from django.db import ProgrammingError, connections, models, router, transaction
from psycopg.errors import UndefinedTable

from celery_pglock.durations import milliseconds

logger = logging.getLogger(__name__)

LONGEST_KEY = 200

# Counting must not hold up the task that is skipped.
LOCK_TIMEOUT = 0.5

COUNT_ONE = """
INSERT INTO celery_pglock_skipcount (key, task_name, hour, count)
VALUES (%s, %s, date_trunc('hour', now()), 1)
ON CONFLICT (key, task_name, hour) DO UPDATE SET count = celery_pglock_skipcount.count + 1
"""


class SkipCounts(models.Manager["SkipCount"]):
    def count_one(self, key: str, task_name: str) -> None:
        """Count one skip in the hour of the database's clock; gives up rather than wait for a lock."""
        alias = self.db
        with transaction.atomic(alias), connections[alias].cursor() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [str(milliseconds(LOCK_TIMEOUT))])
            cursor.execute(COUNT_ONE, [key[:LONGEST_KEY], task_name[:LONGEST_KEY]])


class SkipCount(models.Model):
    """How often a task was skipped because of a key, within one hour."""

    key = models.CharField(max_length=LONGEST_KEY)
    task_name = models.CharField(max_length=LONGEST_KEY)
    hour = models.DateTimeField()
    count = models.PositiveBigIntegerField()

    objects: ClassVar[SkipCounts] = SkipCounts()

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["key", "task_name", "hour"], name="celery_pglock_one_count_an_hour"
            )
        ]

    def __str__(self) -> str:
        return f"{self.task_name} skipped {self.count} times for {self.key!r} in the hour of {self.hour}"


def count_skip(sender: Any, lock: Any, conflict: Any, **_: Any) -> None:
    """Count what the signal ``lock_skipped`` tells; a count that fails is only logged."""
    alias = router.db_for_write(SkipCount)
    if connections[alias].vendor != "postgresql":
        return
    try:
        SkipCount.objects.db_manager(alias).count_one(conflict.key, sender.name)
    except ProgrammingError as error:
        if not isinstance(error.__cause__, UndefinedTable):
            raise
        logger.warning("Skips are not counted: run manage.py migrate celery_pglock --database=%s", alias)
