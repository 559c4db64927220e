"""The journal in which the tests' tasks write what they do, on the clock of the database."""

from typing import Any

from django.db import connection, models
from django.db.models.functions import Now


class ClockTimestamp(Now):
    """The time of the statement, not of its transaction."""

    template = "clock_timestamp()"

    def as_postgresql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, **context)


class Entry(models.Model):
    key = models.CharField(max_length=200)
    task_id = models.CharField(max_length=200)
    what = models.CharField(max_length=20)
    at = models.DateTimeField(db_default=ClockTimestamp())

    class Meta:
        ordering = ["at", "id"]


# The most that were inside of a key's body at once, by the database's clock.
MOST_AT_ONCE = """
SELECT coalesce(max(inside), 0) FROM (
    SELECT sum(CASE what WHEN 'begins' THEN 1 ELSE -1 END) OVER (ORDER BY at, id) AS inside
    FROM tests_entry WHERE key = %s
) AS history
"""


def most_at_once(key: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(MOST_AT_ONCE, [key])
        row: tuple[int] = cursor.fetchone()
        return row[0]
