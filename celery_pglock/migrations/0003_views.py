from typing import Any

import django.db.models.deletion
from django.db import migrations, models

import celery_pglock.fields

# Columns by their names only, so that pg_upgrade can bring the views to a server whose own views have others.
# PostgreSQL knows no statistics of its own functions: after two filters it expects one row, joins thousands by
# nested loops, and would read this view again for each of them. Hence what is MATERIALIZED here and below.
ACTIVITY = r"""
CREATE VIEW celery_pglock_pgactivity AS
WITH backends AS MATERIALIZED (
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
)
SELECT
    id, start, duration, query, context, state, xact_start, backend_start, state_change, wait_event_type, wait_event,
    backend_xid, backend_xmin, backend_type, application_name, client_addr, client_hostname, client_port
FROM backends
"""

# A label is believed where it names the very lock of the row. A backend that waits for a row waits for the
# transaction that changed it, and holds the lock of the row itself meanwhile: that tells the table. A lock
# that is not advisory is of one transaction: a later one's, of the same backend, is not what was chosen.
LOCKS = r"""
CREATE VIEW celery_pglock_pglock AS
WITH queries AS MATERIALIZED (
    SELECT pid, application_name, xact_start, CASE WHEN state <> 'active' THEN state_change END AS ended,
        -- Each word of it with a blank behind; the last is left out if the server has cut the query there.
        regexp_replace(substring(query FROM '^/\*(pglock:1 [^*]*\*?)'), '(?:\*| [^ *]*)$', ' ') AS label
    FROM pg_stat_activity WHERE datname = current_database()
), labels AS MATERIALIZED (
    SELECT pid, label, xact_start, ended,
        substring(label FROM ' task=([^ ]*) ') AS task_name,
        substring(label FROM ' id=([^ ]*) ') AS labelled_id,
        substring(label FROM ' worker=([^ ]*) ') AS worker,
    (
        SELECT string_agg(
            CASE WHEN c ~ '[A-Za-z0-9_.~-]' THEN c ELSE '%' || upper(encode(convert_to(c, 'UTF8'), 'hex')) END,
            '' ORDER BY position
        )
        FROM regexp_split_to_table(substring(application_name FROM '^(?:pglock|celery):(.*)$'), '')
             WITH ORDINALITY AS characters (c, position)
    ) AS task_id
    FROM queries
), keys AS MATERIALIZED (
    SELECT DISTINCT ON (pid, key)
        pid, task_name, labelled_id, worker,
        substring(word FROM '^key=([0-9]+:[0-9]+:[0-9]+):') AS key,
        split_part(word, ':', 4) AS since,
        split_part(word, ':', 5) AS name
    FROM labels, unnest(string_to_array(label, ' ')) WITH ORDINALITY AS words (word, position)
    WHERE word ~ '^key=[0-9]+:[0-9]+:[0-9]+:[0-9.]*:[^:]*$'
    ORDER BY pid, key, position
), locks AS MATERIALIZED (
    SELECT
        l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid, l.objid,
        l.objsubid, l.virtualtransaction, l.pid, l.mode, l.granted, l.waitstart,
        coalesce(l.relation, CASE WHEN l.locktype = 'transactionid' AND NOT l.granted THEN
            max(l.relation) FILTER (WHERE l.locktype = 'tuple' AND l.granted) OVER (PARTITION BY l.pid)
        END) AS its_relation,
        b.pid IS NOT NULL AS is_here, b.xact_start, b.ended, b.task_id,
        k.since AS labelled_since, k.name, k.task_name, k.labelled_id, k.worker
    FROM pg_locks AS l
    -- A full join is never a nested loop.
    FULL JOIN labels AS b ON b.pid = l.pid
    FULL JOIN keys AS k
        ON k.pid = l.pid
        AND k.key = CASE WHEN l.locktype = 'advisory' THEN concat_ws(':', l.objsubid, l.classid, l.objid) END
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
        WHEN l.locktype <> 'advisory' THEN l.xact_start
        WHEN l.labelled_since = '' THEN l.ended
        -- Anybody may write a label: only what to_timestamp() takes.
        WHEN l.labelled_since ~ '^[0-9]{1,11}([.][0-9]+)?$' THEN to_timestamp(l.labelled_since::float8)
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
    l.its_relation::bigint AS relation,
    coalesce(l.name, '') AS name,
    coalesce(l.task_name, '') AS task_name,
    coalesce(nullif(l.labelled_id, ''), l.task_id, '') AS task_id,
    coalesce(l.worker, '') AS worker,
    l.classid::bigint AS classid,
    l.objid::bigint AS objid,
    l.objsubid
FROM locks AS l
LEFT JOIN pg_class AS c ON c.oid = l.its_relation
LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    OR (l.locktype IS NOT NULL AND coalesce(l.database, 0) = 0 AND l.is_here)
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
