"""Events for a broker that takes its time, apart from models: spawned children have none when they begin."""

import time

from celery.app.events import Events
from celery.events import EventDispatcher


class SlowDispatcher(EventDispatcher):
    def send(self, type, *args, **fields):  # noqa: A002 - its name there
        if type.startswith("pglock-"):
            time.sleep(0.7)
        return super().send(type, *args, **fields)


class SlowEvents(Events):
    dispatcher_cls = SlowDispatcher
