from typing import Any

import django.db.models.deletion
from django.db import migrations, models

import celery_pglock.fields

# Columns by their names only, so that pg_upgrade can bring the views to a server whose own views have others.
ACTIVITY = r"""
CREATE VIEW celery_pglock_pgactivity AS
SELECT
    pid AS id,
    query_start AS start,
    clock_timestamp() - query_start AS duration,
    regexp_replace(query, '^/\*(?:pglock:1 |pga_context=)[^*]*\*/\s*', '') AS query,
    substring(query FROM '^/\*(?:pglock:1 |pga_context=)[^*]*(?:\*/)?') AS context,
    upper(replace(state, ' ', '_')) AS state,
    xact_start,
    backend_start,
    state_change,
    upper(regexp_replace(wait_event_type, '([a-z])([A-Z])', '\1_\2', 'g')) AS wait_event_type,
    upper(regexp_replace(wait_event, '([a-z])([A-Z])', '\1_\2', 'g')) AS wait_event,
    backend_xid::text AS backend_xid,
    backend_xmin::text AS backend_xmin,
    upper(replace(backend_type, ' ', '_')) AS backend_type,
    application_name,
    host(client_addr) AS client_addr,
    client_hostname,
    client_port
FROM pg_stat_activity
WHERE datname = current_database()
"""

# A label is believed where it names the very lock of the row. A backend that waits for a row waits for the
# transaction that changed it, and holds the lock of the row itself meanwhile: that tells the table. A lock
# that is not advisory is of one transaction: a later one's, of the same backend, is not what was chosen.
LOCKS = r"""
CREATE VIEW celery_pglock_pglock AS
WITH locks AS MATERIALIZED (
    SELECT locktype, database, relation, page, tuple, virtualxid, transactionid, classid, objid, objsubid,
           virtualtransaction, pid, mode, granted, waitstart
    FROM pg_locks
), labels AS MATERIALIZED (
    SELECT pid, application_name, xact_start,
        -- Each word of it with a blank behind; the last is left out if the server has cut the query there.
        regexp_replace(substring(query FROM '^/\*(pglock:1 [^*]*\*?)'), '(?:\*| [^ *]*)$', ' ') AS label
    FROM pg_stat_activity WHERE datname = current_database()
), backends AS MATERIALIZED (
    SELECT pid, label, xact_start,
        substring(label FROM ' task=([^ ]*) ') AS labelled_task,
        substring(label FROM ' id=([^ ]*) ') AS labelled_id,
        substring(label FROM ' worker=([^ ]*) ') AS labelled_worker,
    (
        SELECT string_agg(
            CASE WHEN c ~ '[A-Za-z0-9_.~-]' THEN c ELSE '%' || upper(encode(convert_to(c, 'UTF8'), 'hex')) END,
            '' ORDER BY position
        )
        FROM regexp_split_to_table(substring(application_name FROM '^(?:pglock|celery):(.*)$'), '')
             WITH ORDINALITY AS characters (c, position)
    ) AS task_id
    FROM labels
), this_database AS MATERIALIZED (
    SELECT oid FROM pg_database WHERE datname = current_database()
)
SELECT
    concat_ws(
        ':', l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid,
        l.objid, l.objsubid, l.pid,
        CASE WHEN l.pid IS NULL OR l.locktype <> 'advisory' THEN l.virtualtransaction END,
        l.mode, CASE WHEN NOT l.granted THEN 'waiting' END
    ) AS id,
    upper(l.locktype) AS type,
    l.pid AS activity_id,
    upper(regexp_replace(regexp_replace(l.mode, 'Lock$', ''), '([a-z])([A-Z])', '\1_\2', 'g')) AS mode,
    l.granted,
    l.waitstart AS wait_start,
    clock_timestamp() - l.waitstart AS wait_duration,
    CASE
        WHEN NOT l.granted THEN l.waitstart
        WHEN l.locktype <> 'advisory' THEN b.xact_start
        -- Anybody may write a label: only what to_timestamp() takes.
        WHEN its.name IS NOT NULL THEN to_timestamp(substring(told.rest FROM '^([0-9]{1,11}([.][0-9]+)?):')::float8)
    END AS since,
    CASE c.relkind
        WHEN 'r' THEN 'TABLE'
        WHEN 'i' THEN 'INDEX'
        WHEN 'S' THEN 'SEQUENCE'
        WHEN 't' THEN 'TOAST'
        WHEN 'v' THEN 'VIEW'
        WHEN 'm' THEN 'MATERIALIZED_VIEW'
        WHEN 'c' THEN 'COMPOSITE_TYPE'
        WHEN 'f' THEN 'FOREIGN_TABLE'
        WHEN 'p' THEN 'PARTITIONED_TABLE'
        WHEN 'I' THEN 'PARTITIONED_INDEX'
        ELSE c.relkind::text
    END AS rel_kind,
    CASE WHEN NOT pg_table_is_visible(c.oid) THEN n.nspname || '.' ELSE '' END || c.relname AS rel_name,
    coalesce(l.relation, of_row.relation)::bigint AS relation,
    coalesce(its.name, '') AS name,
    coalesce(CASE WHEN its.name IS NOT NULL THEN b.labelled_task END, '') AS task_name,
    coalesce(nullif(CASE WHEN its.name IS NOT NULL THEN b.labelled_id END, ''), b.task_id, '') AS task_id,
    coalesce(CASE WHEN its.name IS NOT NULL THEN b.labelled_worker END, '') AS worker,
    l.classid::bigint AS classid,
    l.objid::bigint AS objid,
    l.objsubid
FROM locks AS l
CROSS JOIN this_database AS d
LEFT JOIN backends AS b ON b.pid = l.pid
LEFT JOIN LATERAL (
    SELECT t.relation FROM locks AS t
    WHERE l.locktype = 'transactionid' AND NOT l.granted
      AND t.pid = l.pid AND t.locktype = 'tuple' AND t.granted
    LIMIT 1
) AS of_row ON true
LEFT JOIN pg_class AS c ON c.oid = coalesce(l.relation, of_row.relation)
LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
-- The key as a label has it, followed by since when, and by its name.
LEFT JOIN LATERAL (
    SELECT concat(' key=', l.objsubid, ':', l.classid::bigint, ':', l.objid::bigint, ':') AS start
    WHERE l.locktype = 'advisory'
) AS key ON true
LEFT JOIN LATERAL (
    SELECT split_part(substr(b.label, strpos(b.label, key.start) + length(key.start)), ' ', 1) AS rest
    WHERE strpos(b.label, key.start) > 0
) AS told ON true
LEFT JOIN LATERAL (SELECT substring(told.rest FROM '^[0-9.]*:([^:]*)$') AS name) AS its ON true
WHERE l.database = d.oid OR (coalesce(l.database, 0) = 0 AND b.pid IS NOT NULL)
"""

# PostgreSQL gives 0 for a transaction that was prepared, which has no backend.
BLOCKED = """
CREATE VIEW celery_pglock_blockedpglock AS
SELECT
    concat(l.id, ':', blocker.pid) AS id,
    l.type, l.activity_id, l.mode, l.granted, l.wait_start, l.wait_duration, l.since, l.rel_kind, l.rel_name, l.relation,
    l.name, l.task_name, l.task_id, l.worker, l.classid, l.objid, l.objsubid,
    nullif(blocker.pid, 0) AS blocking_activity_id
FROM celery_pglock_pglock AS l
CROSS JOIN LATERAL (SELECT DISTINCT unnest(pg_blocking_pids(l.activity_id)) AS pid) AS blocker
WHERE NOT l.granted
"""

VIEWS = {
    "celery_pglock_pgactivity": ACTIVITY,
    "celery_pglock_pglock": LOCKS,
    "celery_pglock_blockedpglock": BLOCKED,
}


def create_views(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        for sql in VIEWS.values():
            # Without parameters, or a % would ask for one.
            schema_editor.execute(sql, params=None)


def drop_views(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        for name in reversed(VIEWS):
            schema_editor.execute(f"DROP VIEW {name}")


def lock_fields() -> list[tuple[str, Any]]:
    return [
        ("id", models.TextField(primary_key=True, serialize=False)),
        ("type", celery_pglock.fields.Spelled(max_length=64)),
        ("mode", celery_pglock.fields.Mode(max_length=64)),
        ("granted", models.BooleanField()),
        ("wait_start", models.DateTimeField(null=True)),
        ("wait_duration", celery_pglock.fields.Interval(null=True)),
        ("since", models.DateTimeField(null=True)),
        ("rel_kind", celery_pglock.fields.Spelled(max_length=32, null=True)),
        ("rel_name", models.CharField(max_length=127, null=True)),
        ("relation", models.BigIntegerField(null=True)),
        ("name", celery_pglock.fields.LabelText()),
        ("task_name", celery_pglock.fields.LabelText()),
        ("task_id", celery_pglock.fields.LabelText()),
        ("worker", celery_pglock.fields.LabelText()),
        ("classid", models.BigIntegerField(null=True)),
        ("objid", models.BigIntegerField(null=True)),
        ("objsubid", models.SmallIntegerField(null=True)),
        ("activity", activity_key()),
    ]


def activity_key() -> Any:
    return models.ForeignKey(
        db_constraint=False,
        null=True,
        on_delete=django.db.models.deletion.DO_NOTHING,
        related_name="+",
        to="celery_pglock.pgactivity",
    )


class Migration(migrations.Migration):
    dependencies = [("celery_pglock", "0002_strict_locks")]

    operations = [
        migrations.CreateModel(
            name="PGActivity",
            fields=[
                ("id", models.IntegerField(primary_key=True, serialize=False)),
                ("start", models.DateTimeField(null=True)),
                ("duration", celery_pglock.fields.Interval(null=True)),
                ("query", models.TextField()),
                ("context", celery_pglock.fields.Context(null=True)),
                ("state", celery_pglock.fields.Spelled(max_length=64, null=True)),
                ("xact_start", models.DateTimeField(null=True)),
                ("backend_start", models.DateTimeField(null=True)),
                ("state_change", models.DateTimeField(null=True)),
                ("wait_event_type", celery_pglock.fields.Spelled(max_length=64, null=True)),
                ("wait_event", celery_pglock.fields.Spelled(max_length=64, null=True)),
                ("backend_xid", models.CharField(max_length=64, null=True)),
                ("backend_xmin", models.CharField(max_length=64, null=True)),
                ("backend_type", celery_pglock.fields.Spelled(max_length=64, null=True)),
                ("application_name", models.CharField(max_length=63, null=True)),
                ("client_addr", models.CharField(max_length=64, null=True)),
                ("client_hostname", models.CharField(max_length=256, null=True)),
                ("client_port", models.IntegerField(null=True)),
            ],
            options={
                "managed": False,
                "default_manager_name": "no_objects",
                "default_permissions": ("view",),
                "permissions": (
                    ("cancel_pgactivity", "Can cancel what backends run"),
                    ("terminate_pgactivity", "Can end the sessions of backends"),
                    ("view_pgactivity_query", "Can see the queries of backends"),
                ),
            },
        ),
        migrations.CreateModel(
            name="PGLock",
            fields=lock_fields(),
            options={
                "managed": False,
                "default_manager_name": "no_objects",
                "default_permissions": ("view",),
                "verbose_name": "lock",
            },
        ),
        migrations.CreateModel(
            name="BlockedPGLock",
            fields=[*lock_fields(), ("blocking_activity", activity_key())],
            options={
                "managed": False,
                "default_manager_name": "no_objects",
                "default_permissions": ("view",),
                "verbose_name": "blocked lock",
            },
        ),
        migrations.RunPython(create_views, drop_views),
    ]
