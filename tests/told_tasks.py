"""Tasks of a worker that writes down what is told of their locks, and logs it as the docs show."""

import json
import os
import time
from pathlib import Path

from celery_pglock import AdvisoryTask, Retry, Skip, signals
from celery_pglock.conflicts import PREEMPTED
from tests.celery_app import app
from tests.documents import python_block
from tests.losing_tasks import is_only_warned  # noqa: F401 - the worker takes it, too
from tests.slow_events import SlowEvents
from tests.worker_tasks import work, write

exec(python_block("docs/how-to/structured-logs.md", "# shop/logs.py"))  # noqa: S102 - it is ours

ABOUT_LOCKS = {
    name: getattr(signals, name)
    for name in ("lock_acquired", "lock_conflict", "lock_skipped", "lock_released", "lock_lost")
}


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Retry(0.1), soft_time_limit=0.7)
def meets_its_time_limit_in_a_receiver(self, key):
    return work(self, key, 0)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}", lock_side_effect=Skip("skipped"), send_events=False)
def sends_no_events(self, key):
    return work(self, key, 0)


@app.task(base=AdvisoryTask, lock_key="{key}", lock_on_direct_call=True)
def calls_itself(key, called=False):
    return "done" if called else calls_itself(f"{key}, called", called=True)


@app.task(base=AdvisoryTask, bind=True, lock_key="{key}")
def is_in_the_way_once(self, key):
    write(self, key, "begins")
    if PREEMPTED not in (self.request.headers or {}):
        time.sleep(60)
    return "done"


@app.task(base=AdvisoryTask, lock_key="{key}", lock_priority=5, lock_timeout=20)
def gets_through(key):
    return "through"


app.conf.worker_pool_start_method = os.environ.get("START_METHOD", "fork")
if "SLOW_EVENTS" in os.environ:
    # Children that are spawned have an app of their own, made after this one.
    app.events_cls = SlowEvents


class WithoutItsLock(AdvisoryTask):
    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)


@app.task(base=WithoutItsLock, lock_key="{key}")
def does_not_take_its_lock(key):
    return "done"


def write_down(sender, signal, lock, conflict=None, **arguments):
    told = {name: value for name, value in arguments.items() if isinstance(value, str | int | float)}
    if conflict:
        told |= {"attempt": conflict.attempt, "waited": conflict.waited, "holders": len(conflict.holders)}
    name = next(name for name, one in ABOUT_LOCKS.items() if one is signal)
    told |= {"signal": name, "id": sender.request.id, "name": sender.name, "lock": lock.name}
    with Path(os.environ["TOLD"]).open("a") as file:
        file.write(json.dumps(told) + "\n")


def fail(**_):
    raise ValueError("as asked")


def dawdle(sender, outcome="", **_):
    if sender.name == meets_its_time_limit_in_a_receiver.name and outcome in ("", "waits"):
        time.sleep(15)


if "TOLD" in os.environ:
    for one in ABOUT_LOCKS.values():
        one.connect(fail)
        one.connect(write_down)
    for one in (signals.lock_acquired, signals.lock_conflict):
        one.connect(dawdle)
