from typing import Any

from django.db import migrations

# Who waits is asked first, of those who do something. Whoever is idle waits for no lock, but to have a statement
# described, and what others do may be hidden from this role. pg_locks is read once, and only if somebody waits,
# because that stops all who take locks, for longer the more there are. What this transaction has seen of the
# backends before is forgotten, or those who wait since then were missed.
WAITS = r"""
CREATE VIEW celery_pglock_wait AS
WITH active AS MATERIALIZED (
    SELECT pid, application_name,
        regexp_replace(substring(query FROM '^/\*(pglock:1 [^*]*\*?)'), '(?:\*| [^ *]*)$', ' ') AS label,
        ARRAY(SELECT DISTINCT unnest(pg_blocking_pids(pid))) AS blockers
    FROM pg_stat_activity
    WHERE (SELECT count(forgotten) FROM (SELECT pg_stat_clear_snapshot() AS forgotten OFFSET 0) AS f) > 0
        AND datname = current_database()
        AND (coalesce(state, '') NOT LIKE 'idle%' OR wait_event_type = 'Lock')
), blocked AS MATERIALIZED (
    SELECT pid, blockers, label,
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
    FROM active WHERE cardinality(blockers) > 0
), locks AS MATERIALIZED (
    SELECT locktype, database, relation, page, tuple, virtualxid, transactionid, classid, objid, objsubid,
        virtualtransaction, pid, mode, granted, waitstart
    FROM pg_locks
    WHERE (SELECT count(*) FROM blocked) > 0 AND (NOT granted OR locktype = 'tuple')
), tuples AS MATERIALIZED (
    SELECT pid, max(relation) AS relation FROM locks WHERE granted GROUP BY pid
), waits AS MATERIALIZED (
    SELECT l.*, coalesce(l.relation, CASE WHEN l.locktype = 'transactionid' THEN t.relation END) AS its_relation,
        b.blockers, b.label, b.task_name, b.labelled_id, b.worker, b.task_id,
        '^key=' || concat_ws(':', l.objsubid, l.classid, l.objid) || ':[0-9.]*:[^:]*$' AS its_key
    FROM locks AS l
    JOIN blocked AS b ON b.pid = l.pid
    LEFT JOIN tuples AS t ON t.pid = l.pid
    WHERE NOT l.granted
        AND (coalesce(l.database, 0) = 0
            OR l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
), words AS MATERIALIZED (
    SELECT w.*, k.word
    FROM waits AS w
    LEFT JOIN LATERAL (
        SELECT word
        FROM unnest(CASE WHEN w.locktype = 'advisory' THEN string_to_array(w.label, ' ') END)
            WITH ORDINALITY AS words (word, position)
        WHERE word ~ w.its_key
        ORDER BY position
        LIMIT 1
    ) AS k ON true
)
SELECT
    concat_ws(
        ':', l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid,
        l.objid, l.objsubid, l.pid, CASE WHEN l.locktype <> 'advisory' THEN l.virtualtransaction END,
        l.mode, 'waiting'
    ) AS id,
    upper(l.locktype) AS type,
    l.pid AS activity_id,
    upper(regexp_replace(regexp_replace(l.mode, 'Lock$', ''), '([a-z])([A-Z])', '\1_\2', 'g')) AS mode,
    l.granted,
    l.waitstart AS wait_start,
    clock_timestamp() - l.waitstart AS wait_duration,
    l.waitstart AS since,
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
    coalesce(split_part(l.word, ':', 5), '') AS name,
    CASE WHEN l.word IS NULL THEN '' ELSE coalesce(l.task_name, '') END AS task_name,
    coalesce(nullif(CASE WHEN l.word IS NOT NULL THEN l.labelled_id END, ''), l.task_id, '') AS task_id,
    CASE WHEN l.word IS NULL THEN '' ELSE coalesce(l.worker, '') END AS worker,
    l.classid::bigint AS classid,
    l.objid::bigint AS objid,
    l.objsubid,
    l.blockers
FROM words AS l
LEFT JOIN pg_class AS c ON c.oid = l.its_relation
LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
"""

# It shows to a role what it sees in pg_locks and pg_stat_activity, and one that has rights on the views that
# were there before needs no others than those.
FOR_EVERYBODY = "GRANT SELECT ON celery_pglock_wait TO PUBLIC"

COLUMNS = """
    l.type, l.activity_id, l.mode, l.granted, l.wait_start, l.wait_duration, l.since, l.rel_kind, l.rel_name, l.relation,
    l.name, l.task_name, l.task_id, l.worker, l.classid, l.objid, l.objsubid
"""

# As it was in place: rights that were granted on it stay.
BLOCKED_LOCKS = f"""
CREATE OR REPLACE VIEW celery_pglock_blockedpglock AS
SELECT concat(l.id, ':', blocker.pid) AS id, {COLUMNS}, nullif(blocker.pid, 0) AS blocking_activity_id
FROM celery_pglock_wait AS l CROSS JOIN LATERAL unnest(l.blockers) AS blocker (pid)
"""

BLOCKED_LOCKS_BEFORE = f"""
CREATE OR REPLACE VIEW celery_pglock_blockedpglock AS
SELECT concat(l.id, ':', blocker.pid) AS id, {COLUMNS}, nullif(blocker.pid, 0) AS blocking_activity_id
FROM celery_pglock_pglock AS l
CROSS JOIN LATERAL (SELECT DISTINCT unnest(pg_blocking_pids(l.activity_id)) AS pid) AS blocker
WHERE NOT l.granted
"""


def look_at_sessions_first(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        # Without parameters, or a % would ask for one.
        for sql in (WAITS, FOR_EVERYBODY, BLOCKED_LOCKS):
            schema_editor.execute(sql, params=None)


def look_at_locks_first(apps: Any, schema_editor: Any) -> None:
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(BLOCKED_LOCKS_BEFORE, params=None)
        schema_editor.execute("DROP VIEW celery_pglock_wait")


class Migration(migrations.Migration):
    dependencies = [("celery_pglock", "0005_reports")]

    operations = [migrations.RunPython(look_at_sessions_first, look_at_locks_first)]
