from collections.abc import Callable
from typing import Any

from django.db import migrations, models


def on_postgresql(sql: str) -> Callable[[Any, Any], None]:
    def run(apps: Any, schema_editor: Any) -> None:
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(sql)

    return run


class Migration(migrations.Migration):
    dependencies = [("celery_pglock", "0001_initial")]

    operations = [
        migrations.CreateModel(
            name="KeyState",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "objsubid",
                        "classid",
                        "objid",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("objsubid", models.SmallIntegerField()),
                ("classid", models.BigIntegerField()),
                ("objid", models.BigIntegerField()),
                ("timeline", models.BigIntegerField()),
                ("number", models.BigIntegerField()),
                ("lease", models.FloatField()),
                ("task_id", models.CharField(max_length=200)),
                ("is_clean", models.BooleanField()),
                ("was_clean", models.BooleanField()),
                ("was_lease", models.FloatField()),
                ("was_task_id", models.CharField(max_length=200)),
            ],
            options={"db_table": "celery_pglock_keystate"},
        ),
        # Tokens come from a sequence, so that one token serves several keys, and deleting a row repeats none.
        migrations.RunPython(
            on_postgresql("CREATE SEQUENCE celery_pglock_token AS bigint"),
            on_postgresql("DROP SEQUENCE celery_pglock_token"),
        ),
        migrations.CreateModel(
            name="LossCount",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("key", models.CharField(max_length=200)),
                ("task_name", models.CharField(max_length=200)),
                ("hour", models.DateTimeField()),
                ("count", models.PositiveBigIntegerField()),
            ],
            options={
                "constraints": [
                    models.UniqueConstraint(
                        fields=("key", "task_name", "hour"), name="celery_pglock_one_loss_count_an_hour"
                    )
                ],
            },
        ),
    ]
