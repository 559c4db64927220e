"""What a lock adds to a task, run eagerly or by real workers, near its servers or farther away."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from benchmarks import cores, proxy
from benchmarks.celery_app import BATCH
from benchmarks.contenders import contending, variables_of
from benchmarks.rounds import Rounds, interleaved
from benchmarks.tables import Bars, Scale, Table, Target

ROUND_TRIP = 0.0005  # seconds: a network within one zone of a cloud

FLOOR = "floor: SELECT 1"
PLAIN = "plain task"
PLAIN_WITHOUT_RESULT = "plain task, result ignored"
SESSION = "AdvisoryTask"
SESSION_WITHOUT_RESULT = "AdvisoryTask, result ignored"
BY_HAND = "by hand in the body, psycopg"
DJANGO_PGLOCK = "django-pglock in the body"
DJANGO_PGLOCK_REUSING = "django-pglock in the body, connections reused"

DJANGO = {"DJANGO_SETTINGS_MODULE": "benchmarks.django_settings"}
WITHOUT_RESULT = {"IGNORE_RESULT": "yes"}
REUSING = {"CELERY_DB_REUSE_MAX": "1000"}  # tasks

# Each kind of task by its module in benchmarks.apps, and what its processes have in their environment.
KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    PLAIN: ("plain", DJANGO),
    PLAIN_WITHOUT_RESULT: ("plain", {**DJANGO, **WITHOUT_RESULT}),
    "plain task, without Django": ("plain", {}),
    SESSION: ("session", {**DJANGO, "APPS": "celery_pglock"}),
    SESSION_WITHOUT_RESULT: ("session", {**DJANGO, **WITHOUT_RESULT, "APPS": "celery_pglock"}),
    "XactAdvisoryTask": ("xact", {**DJANGO, "APPS": "celery_pglock"}),
    BY_HAND: ("by_hand", DJANGO),
    "redis-py Lock in the body": ("redis_lock", DJANGO),
    DJANGO_PGLOCK: ("django_pglock", {**DJANGO, "APPS": "pgactivity pglock"}),
    DJANGO_PGLOCK_REUSING: ("django_pglock", {**DJANGO, **REUSING, "APPS": "pgactivity pglock"}),
    "celery-once": ("once", DJANGO),
    "celery-singleton": ("singleton", DJANGO),
}
QUICK_KINDS = (PLAIN, SESSION, BY_HAND, "redis-py Lock in the body", DJANGO_PGLOCK, DJANGO_PGLOCK_REUSING)

POOLS = ("prefork", "solo")

EAGER_NOTE = """\
Sent by `delay()` with `task_always_eager`, so that also those take their lock that do so when a task is sent.
*Added* is what it takes over the plain task of the same round, in floors (`SELECT 1`) of the same round."""

WORKERS_NOTE = """\
A batch of tasks with different arguments, timed from the first that is sent until the worker knows the result
of the last, as the ratio to the plain task in the same round (with the result ignored: to that plain task).
Workers of all kinds are running, and one at a time has something to do; prefork has two child processes. All
run in a Django project, under Celery's fixup, which closes Django's connections around each task: what
django-pglock in the body adds is mostly a new one, which a body that uses Django's models opens anyway, and
which is not closed with `CELERY_DB_REUSE_MAX` (*connections reused*). *Away* puts a network of
{round_trip:g} ms, there and back, between the processes of Celery and both servers; a `SELECT 1` took
{measured:.2f} ms then."""


def measure(scale: Scale) -> list[Table]:
    eager = _eager(scale)
    here = {pool: _workers(scale, pool, variables_of(scale)) for pool in _pools(scale)}
    with proxy.distant(scale.database_url, scale.redis_url, round_trip=ROUND_TRIP) as (
        database_url,
        redis_url,
    ):
        variables = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        with contending({FLOOR: "benchmarks.lock_contenders:floor"}, variables) as floor:
            round_trip = interleaved(floor, rounds=5, operations=100).seconds(FLOOR).median
        away = {pool: _workers(scale, pool, variables) for pool in _pools(scale)}
    found = {pool: here[pool] for pool in here} | {f"{pool}, away": away[pool] for pool in away}
    note = WORKERS_NOTE.format(round_trip=ROUND_TRIP * 1000, measured=round_trip * 1000)
    kinds = _kinds(scale)
    return [
        eager,
        Table(
            name="tasks",
            title="Tasks sent to workers and run by them, to a plain task",
            columns=("what", *found),
            rows=[(kind, *(_ratio(rounds, kind) for rounds in found.values())) for kind in kinds],
            note=note,
            targets=_targets(found),
            chart=Bars(list(found)),
        ),
        Table(
            name="tasks-spread",
            title="The same in ms per task, and between which ratios half of the rounds are",
            columns=("what", *found),
            rows=[(kind, *(_details(rounds, kind) for rounds in found.values())) for kind in kinds],
        ),
    ]


def _pools(scale: Scale) -> tuple[str, ...]:
    return scale.choose(full=POOLS, quick=POOLS[:1])


def _kinds(scale: Scale) -> tuple[str, ...]:
    return scale.choose(full=tuple(KINDS), quick=QUICK_KINDS)


def _environments(kinds: tuple[str, ...], **variables: str) -> dict[str, Mapping[str, str]]:
    return {
        kind: {"TASK_APP": f"benchmarks.apps.{KINDS[kind][0]}", **KINDS[kind][1], **variables}
        for kind in kinds
    }


def _eager(scale: Scale) -> Table:
    # Run eagerly, no task has its result stored, and nobody closes connections.
    only_by_workers = (PLAIN_WITHOUT_RESULT, SESSION_WITHOUT_RESULT, DJANGO_PGLOCK_REUSING)
    kinds = [kind for kind in _kinds(scale) if kind not in only_by_workers]
    targets = {FLOOR: "benchmarks.lock_contenders:floor"}
    targets |= dict.fromkeys(kinds, "benchmarks.task_contenders:eager")
    own = _environments(tuple(kinds), EAGER="yes")
    with cores.apart(scale) as is_apart, contending(targets, variables_of(scale), own) as contenders:
        found = interleaved(
            contenders,
            rounds=scale.choose(full=31, quick=5),
            seconds=scale.choose(full=0.06, quick=0.02),
        )
    rows: list[tuple[str | float | None, ...]] = []
    for kind in kinds:
        if found.has(kind):
            added = found.ratio(kind, FLOOR, minus=PLAIN)
            rows.append((kind, found.seconds(kind).median * 1e6, added.median, added.spread))
        else:
            rows.append((kind, None, None, found.failures[kind]))
    added = found.ratio(SESSION, FLOOR, minus=PLAIN).median
    return Table(
        name="tasks-eager",
        title="Tasks run eagerly",
        columns=("what", "µs", "added", "spread"),
        rows=rows,
        note=f"{EAGER_NOTE}\n{cores.NOTE}" if is_apart else EAGER_NOTE,
        targets=[Target("added by AdvisoryTask, in floors", added, 2.5)],
        chart=Bars(["added"]),
    )


def _workers(scale: Scale, pool: str, variables: Mapping[str, str]) -> Rounds:
    kinds = _kinds(scale)
    batch = scale.choose(full=150, quick=100)
    own = _environments(kinds, **{BATCH: str(batch)})
    with ExitStack() as running:
        targets = dict.fromkeys(kinds, f"benchmarks.task_contenders:{pool}")
        contenders = running.enter_context(contending(targets, variables, own))
        return interleaved(contenders, rounds=scale.choose(full=7, quick=3), operations=batch)


def _plain(kind: str) -> str:
    return PLAIN_WITHOUT_RESULT if KINDS[kind][1].get("IGNORE_RESULT") else PLAIN


def _ratio(found: Rounds, kind: str) -> float | str:
    return found.ratio(kind, _plain(kind)).median if found.has(kind) else "failed"


def _details(found: Rounds, kind: str) -> str:
    if not found.has(kind):
        return found.failures[kind]
    return f"{found.seconds(kind).median * 1000:.2f} ms ({found.ratio(kind, _plain(kind)).spread})"


def _targets(found: Mapping[str, Rounds]) -> list[Target]:
    here, away = found["prefork"], found["prefork, away"]
    targets = [
        Target("AdvisoryTask, prefork, to a plain task", here.ratio(SESSION, PLAIN).median, 1.05),
        Target("the same, away", away.ratio(SESSION, PLAIN).median, 1.30),
    ]
    for name, rounds in (("prefork", here), ("prefork, away", away)):
        if rounds.has(DJANGO_PGLOCK):
            ratio = rounds.ratio(SESSION, DJANGO_PGLOCK).median
            targets.append(Target(f"AdvisoryTask to django-pglock on a new connection, {name}", ratio, 1 / 3))
    return targets
