"""Tasks of packages that keep messages apart, with locks of ours by rules."""

import time

from celery_once import QueueOnce
from celery_singleton import Singleton

from celery_pglock import AdvisoryTask, Raise, Retry, Skip, install
from tests.celery_app import app
from tests.worker_tasks import write

app.conf.ONCE = {
    "backend": "celery_once.backends.Redis",
    "settings": {"url": app.conf.broker_url, "default_timeout": 60},
}

BY_KEY = {"lock_by": ("key",), "lock_side_effect": Skip("skipped")}
COMES_BACK = {**BY_KEY, "lock_side_effect": Retry(countdown=0.1)}

install(
    app,
    {
        "once.skips": BY_KEY,
        "singleton.skips": BY_KEY,
        "once.comes_back": COMES_BACK,
        "once.comes_back_gracefully": COMES_BACK,
        "singleton.comes_back": COMES_BACK,
        "once.waits": {**BY_KEY, "lock_timeout": 15, "lock_side_effect": Raise()},
        "once.gives_up": {**BY_KEY, "lock_timeout": 0.2, "lock_side_effect": Raise()},
    },
)


def work(self, key, seconds=0.0):
    write(self, key, "begins")
    time.sleep(seconds)
    write(self, key, "ends")
    return "done"


def task(name, base, **options):
    return app.task(name=name, base=base, bind=True, **options)(work)


once_without_a_lock = task("once.without_a_lock", QueueOnce, once={"keys": ["key"], "timeout": 1})
singleton_without_a_lock = task("singleton.without_a_lock", Singleton, unique_on=["key"], lock_expiry=1)
once_skips = task("once.skips", QueueOnce, once={"keys": ["key"]})
singleton_skips = task("singleton.skips", Singleton, unique_on=["key"])
once_comes_back = task("once.comes_back", QueueOnce, once={"keys": ["key"]})
once_comes_back_gracefully = task(
    "once.comes_back_gracefully", QueueOnce, once={"keys": ["key"], "graceful": True}
)
singleton_comes_back = task("singleton.comes_back", Singleton, unique_on=["key"])
once_waits = task("once.waits", QueueOnce, once={"keys": ["key"], "unlock_before_run": True})
once_gives_up = task("once.gives_up", QueueOnce, once={"keys": ["key"], "unlock_before_run": True})
once_all_arguments = task("once.all_arguments", QueueOnce)
singleton_all_arguments = task("singleton.all_arguments", Singleton)


@app.task(name="singleton.retries_itself", base=Singleton, bind=True)
def singleton_retries_itself(self, key):
    raise self.retry(countdown=0)


@app.task(name="moved", base=AdvisoryTask, **BY_KEY)
def moved(key):
    return "done"
