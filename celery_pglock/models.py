"""What is known about locks, as models of Django."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import Any, ClassVar

from django.db import ProgrammingError, connections, models, router, transaction
from psycopg.errors import InsufficientPrivilege, UndefinedTable

from celery_pglock import audits, fences
from celery_pglock.durations import milliseconds
from celery_pglock.fields import Context, Interval, LabelText, Mode, Spelled
from celery_pglock.querysets import BlockedPGLockQuerySet, PGActivityQuerySet, PGLockQuerySet

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

    # Here and below: mypy's plugin would know the types of fields, and other type checkers have none.
    key: models.CharField[str, str] = models.CharField(max_length=LONGEST_KEY)
    task_name: models.CharField[str, str] = models.CharField(max_length=LONGEST_KEY)
    hour: models.DateTimeField[datetime, datetime] = models.DateTimeField(db_index=True)
    count: models.PositiveBigIntegerField[int, int] = models.PositiveBigIntegerField()

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

    pk: models.CompositePrimaryKey = models.CompositePrimaryKey("objsubid", "classid", "objid")
    objsubid: models.SmallIntegerField[int, int] = models.SmallIntegerField()
    classid: models.BigIntegerField[int, int] = models.BigIntegerField()
    objid: models.BigIntegerField[int, int] = models.BigIntegerField()
    timeline: models.BigIntegerField[int, int] = models.BigIntegerField()
    number: models.BigIntegerField[int, int] = models.BigIntegerField()
    lease: models.FloatField[float, float] = models.FloatField()
    task_id: models.CharField[str, str] = models.CharField(max_length=fences.LONGEST_TASK_ID)
    is_clean: models.BooleanField[bool, bool] = models.BooleanField()
    was_clean: models.BooleanField[bool, bool] = models.BooleanField()
    was_lease: models.FloatField[float, float] = models.FloatField()
    was_task_id: models.CharField[str, str] = models.CharField(max_length=fences.LONGEST_TASK_ID)

    class Meta:
        db_table = fences.TABLE

    def __str__(self) -> str:
        return f"key {self.pk}: token ({self.timeline}, {self.number}) of task {self.task_id}"


class Act(models.Model):
    """A backend that was to be stopped: written before it is, and never changed.

    ``through`` is the door: a command, ``prioritize`` or other code; ``by`` is who stands there. Of the
    backend's query only the MD5 is kept. ``reason`` names the locks for which it was chosen. ``task_id`` is
    of the task that the backend works for, if any, as far as PostgreSQL keeps it; ``comes_back`` whether that
    task goes back to its queue, and ``None`` where its own options say what becomes of it.
    """

    at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    through: models.CharField[str, str] = models.CharField(max_length=audits.LONGEST_TEXT)
    by: models.CharField[str, str] = models.CharField(max_length=audits.LONGEST_TEXT)
    action: models.CharField[str, str] = models.CharField(max_length=20)
    pid: models.IntegerField[int, int] = models.IntegerField()
    backend_start: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    role: models.CharField[str | None, str | None] = models.CharField(max_length=63, null=True)
    application_name: models.CharField[str | None, str | None] = models.CharField(max_length=63, null=True)
    client_addr: models.CharField[str | None, str | None] = models.CharField(max_length=64, null=True)
    task_id: models.CharField[str, str] = models.CharField(max_length=63)
    comes_back: models.BooleanField[bool | None, bool | None] = models.BooleanField(null=True)
    query_hash: models.CharField[str | None, str | None] = models.CharField(max_length=32, null=True)
    reason: models.CharField[str, str] = models.CharField(max_length=audits.LONGEST_TEXT)

    class Meta:
        db_table = audits.TABLE
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)
        verbose_name = "audited act"
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["task_id"], name="celery_pglock_act_of_task")
        ]

    def __str__(self) -> str:
        return f"{self.action} backend {self.pid}, {self.at}"


class Outcome(models.Model):
    """What became of a backend that was to be stopped, as ``Stop.outcome`` has it.

    An act without one is of a process that did not live to tell.
    """

    act: models.OneToOneField[Act, Act] = models.OneToOneField(
        Act, on_delete=models.CASCADE, primary_key=True
    )
    at: models.DateTimeField[datetime, datetime] = models.DateTimeField()
    outcome: models.CharField[str, str] = models.CharField(max_length=20)

    class Meta:
        db_table = audits.OUTCOMES
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)

    def __str__(self) -> str:
        return self.outcome


class LockReport(models.Model):
    """What a report found among the locks of this database.

    ``held`` counts advisory locks, ``waiting`` waits for locks of any kind, and ``skipped`` the skips that
    were counted lately. What could not be read is ``None``, and named in ``unread``. ``findings`` is a list
    of objects, each with a ``kind``.
    """

    at: models.DateTimeField[datetime, datetime] = models.DateTimeField(db_index=True)
    held: models.PositiveIntegerField[int | None, int | None] = models.PositiveIntegerField(null=True)
    waiting: models.PositiveIntegerField[int | None, int | None] = models.PositiveIntegerField(null=True)
    skipped: models.PositiveBigIntegerField[int | None, int | None] = models.PositiveBigIntegerField(
        null=True
    )
    longest_held: models.DurationField[timedelta | None, timedelta | None] = models.DurationField(null=True)
    longest_wait: models.DurationField[timedelta | None, timedelta | None] = models.DurationField(null=True)
    findings: models.JSONField[list[Any], list[Any]] = models.JSONField(default=list)
    unread: models.JSONField[list[Any], list[Any]] = models.JSONField(default=list)

    class Meta:
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)

    def __str__(self) -> str:
        return f"report {self.pk}"


class NothingToDump(models.Manager[Any]):
    """What ``dumpdata`` finds: rows of a view cannot be loaded again."""

    def get_queryset(self) -> models.QuerySet[Any]:
        return super().get_queryset().none()


class View(models.Model):
    """A view of ours; nothing in it can be saved or deleted."""

    no_objects: ClassVar[NothingToDump] = NothingToDump()

    class Meta:
        abstract = True
        managed = False
        default_manager_name = "no_objects"
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)


class PGActivity(View):
    """A backend of this database, as ``pg_stat_activity`` shows it; ``id`` is its pid.

    ``duration`` is the time since its statement began. ``query`` is without the comment that ``context`` was
    read from. What this role may not see is ``None``.
    """

    id: models.IntegerField[int, int] = models.IntegerField(primary_key=True)
    start: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    duration: models.DurationField[timedelta | None, timedelta | None] = Interval(null=True)
    query: models.TextField[str, str] = models.TextField()
    context: models.TextField[dict[str, Any] | None, dict[str, Any] | None] = Context(null=True)
    state: models.CharField[str | None, str | None] = Spelled(max_length=64, null=True)
    xact_start: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    backend_start: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    state_change: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    wait_event_type: models.CharField[str | None, str | None] = Spelled(max_length=64, null=True)
    wait_event: models.CharField[str | None, str | None] = Spelled(max_length=64, null=True)
    backend_xid: models.CharField[str | None, str | None] = models.CharField(max_length=64, null=True)
    backend_xmin: models.CharField[str | None, str | None] = models.CharField(max_length=64, null=True)
    backend_type: models.CharField[str | None, str | None] = Spelled(max_length=64, null=True)
    application_name: models.CharField[str | None, str | None] = models.CharField(max_length=63, null=True)
    client_addr: models.CharField[str | None, str | None] = models.CharField(max_length=64, null=True)
    client_hostname: models.CharField[str | None, str | None] = models.CharField(max_length=256, null=True)
    client_port: models.IntegerField[int | None, int | None] = models.IntegerField(null=True)

    objects: ClassVar[PGActivityQuerySet[PGActivity]] = PGActivityQuerySet.as_manager()  # type: ignore[assignment]

    class Meta(View.Meta):
        abstract = False
        permissions: ClassVar[tuple[tuple[str, str], ...]] = (
            ("cancel_pgactivity", "Can cancel what backends run"),
            ("terminate_pgactivity", "Can end the sessions of backends"),
            ("view_pgactivity_query", "Can see the queries of backends"),
        )

    def __str__(self) -> str:
        return f"backend {self.pk} ({self.application_name or 'unnamed'}, {self.state})"


class Lock(View):
    """A lock that a backend holds or waits for.

    ``activity`` is ``None`` for one of a transaction that was prepared. ``relation`` is the oid of the table,
    which a wait for a row has, too. Advisory locks have the numbers that ``pg_locks`` prints, and those of
    lock sessions the names in their labels: hints, which other roles could forge for locks of their own.
    ``since`` is when the wait began; of an advisory lock that is held, when it was obtained, as its label
    says; of another one that is held, when its transaction began, so that it may be younger.
    """

    id: models.TextField[str, str] = models.TextField(primary_key=True)
    type: models.CharField[str, str] = Spelled(max_length=64)
    activity: models.ForeignKey[PGActivity | None, PGActivity | None] = models.ForeignKey(
        PGActivity, on_delete=models.DO_NOTHING, db_constraint=False, null=True, related_name="+"
    )
    mode: models.CharField[str, str] = Mode(max_length=64)
    granted: models.BooleanField[bool, bool] = models.BooleanField()
    wait_start: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    wait_duration: models.DurationField[timedelta | None, timedelta | None] = Interval(null=True)
    since: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True)
    rel_kind: models.CharField[str | None, str | None] = Spelled(max_length=32, null=True)
    rel_name: models.CharField[str | None, str | None] = models.CharField(max_length=127, null=True)
    relation: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(null=True)
    name: models.TextField[str, str] = LabelText()
    task_name: models.TextField[str, str] = LabelText()
    task_id: models.TextField[str, str] = LabelText()
    worker: models.TextField[str, str] = LabelText()
    classid: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(null=True)
    objid: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(null=True)
    objsubid: models.SmallIntegerField[int | None, int | None] = models.SmallIntegerField(null=True)

    class Meta(View.Meta):
        abstract = True

    def __str__(self) -> str:
        what = self.name or self.rel_name or f"{self.classid}:{self.objid}"
        return f"{self.type} {what} in {self.mode} of backend {self.activity_id}"


class PGLock(Lock):
    """A lock of this database, held or waited for, as ``pg_locks`` shows it."""

    objects: ClassVar[PGLockQuerySet[PGLock]] = PGLockQuerySet.as_manager()  # type: ignore[assignment]

    class Meta(Lock.Meta):
        abstract = False
        verbose_name = "lock"


class BlockedPGLock(Lock):
    """A wait for a lock, once for each backend that is in the way.

    ``blocking_activity`` is ``None`` for a transaction that was prepared.
    """

    blocking_activity: models.ForeignKey[PGActivity | None, PGActivity | None] = models.ForeignKey(
        PGActivity, on_delete=models.DO_NOTHING, db_constraint=False, null=True, related_name="+"
    )

    objects: ClassVar[BlockedPGLockQuerySet[BlockedPGLock]] = BlockedPGLockQuerySet.as_manager()  # type: ignore[assignment]

    class Meta(Lock.Meta):
        abstract = False
        verbose_name = "blocked lock"


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
        if isinstance(error.__cause__, UndefinedTable):
            cure = f"run manage.py migrate celery_pglock --database={alias}"
        elif isinstance(error.__cause__, InsufficientPrivilege):
            cure = f"the role of alias {alias!r} needs SELECT, INSERT and UPDATE on {model._meta.db_table}"
        else:
            raise
        logger.warning("Nothing is counted: %s", cure)
