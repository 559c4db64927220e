"""What is kept about locks in tables of their own."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from django.db import ProgrammingError, connections, models, router, transaction
from psycopg.errors import UndefinedTable

from celery_pglock import fences
from celery_pglock.durations import milliseconds

logger = logging.getLogger(__name__)

LONGEST_KEY = 200

# Counting must not hold up the task that is skipped.
LOCK_TIMEOUT = 0.5

COUNT_ONE = """
INSERT INTO {table} AS counts (key, task_name, hour, count)
VALUES (%s, %s, date_trunc('hour', now()), 1)
ON CONFLICT (key, task_name, hour) DO UPDATE SET count = counts.count + 1
"""


class HourlyCounts(models.Manager[Any]):
    def count_one(self, key: str, task_name: str) -> None:
        """Count one in the hour of the database's clock; gives up rather than wait for a lock."""
        alias = self.db
        sql = COUNT_ONE.format(table=connections[alias].ops.quote_name(self.model._meta.db_table))
        with transaction.atomic(alias), connections[alias].cursor() as cursor:
            cursor.execute("SELECT set_config('lock_timeout', %s, true)", [str(milliseconds(LOCK_TIMEOUT))])
            cursor.execute(sql, [key[:LONGEST_KEY], task_name[:LONGEST_KEY]])


class HourlyCount(models.Model):
    """How often something happened to a task because of a key, within one hour."""

    key = models.CharField(max_length=LONGEST_KEY)
    task_name = models.CharField(max_length=LONGEST_KEY)
    hour = models.DateTimeField()
    count = models.PositiveBigIntegerField()

    objects: ClassVar[HourlyCounts] = HourlyCounts()

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.task_name}: {self.count} for {self.key!r} in the hour of {self.hour}"


class SkipCount(HourlyCount):
    """How often a task was skipped because of a key, within one hour."""

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["key", "task_name", "hour"], name="celery_pglock_one_count_an_hour"
            )
        ]


class LossCount(HourlyCount):
    """How often a task lost its lock on a key before it gave it back, within one hour."""

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["key", "task_name", "hour"], name="celery_pglock_one_loss_count_an_hour"
            )
        ]


class KeyState(models.Model):
    """The newest strict holder of a key, and whether it left in order; the lock's own statements write it."""

    pk = models.CompositePrimaryKey("objsubid", "classid", "objid")
    objsubid = models.SmallIntegerField()
    classid = models.BigIntegerField()
    objid = models.BigIntegerField()
    timeline = models.BigIntegerField()
    number = models.BigIntegerField()
    lease = models.FloatField()
    task_id = models.CharField(max_length=fences.LONGEST_TASK_ID)
    is_clean = models.BooleanField()
    was_clean = models.BooleanField()
    was_lease = models.FloatField()
    was_task_id = models.CharField(max_length=fences.LONGEST_TASK_ID)

    class Meta:
        db_table = fences.TABLE

    def __str__(self) -> str:
        return f"key {self.pk}: token ({self.timeline}, {self.number}) of task {self.task_id}"


def count_skip(sender: Any, lock: Any, conflict: Any, **_: Any) -> None:
    """Count what the signal ``lock_skipped`` tells; a count that fails is only logged."""
    _count(SkipCount, conflict.key, sender.name)


def count_loss(sender: Any, lock: Any, **_: Any) -> None:
    """Count what the signal ``lock_lost`` tells; a count that fails is only logged."""
    _count(LossCount, lock.name, sender.name)


def _count(model: type[HourlyCount], key: str, task_name: str) -> None:
    alias = router.db_for_write(model)
    if connections[alias].vendor != "postgresql":
        return
    try:
        model.objects.db_manager(alias).count_one(key, task_name)
    except ProgrammingError as error:
        if not isinstance(error.__cause__, UndefinedTable):
            raise
        logger.warning("Nothing is counted: run manage.py migrate celery_pglock --database=%s", alias)
