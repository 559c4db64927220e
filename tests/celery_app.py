"""The Celery app of the tests."""

import os

from celery import Celery

from celery_pglock import AdvisoryTask, XactAdvisoryTask, install

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")


class ByRules(Celery):
    """Its tasks have the app's own base class, and take their locks by rules alone."""

    def task(self, *args, **options):
        base = options.get("base")
        if args or base not in (AdvisoryTask, XactAdvisoryTask):
            return super().task(*args, **options)
        del options["base"]
        given = {name: options.pop(name) for name in tuple(options) if name.startswith("lock_")}
        decorate = super().task(**options)

        def decorate_and_rule(function):
            name = options.get("name") or self.gen_task_name(function.__name__, function.__module__)
            install(self, {name: {"lock_xact": base is XactAdvisoryTask, **given}})
            return decorate(function)

        return decorate_and_rule


app = (ByRules if os.environ.get("BY_RULES") else Celery)(
    "tests", task_cls=os.environ.get("TASK_CLS", "celery.contrib.django.task:DjangoTask")
)
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["tests"], related_name=os.environ.get("TASKS", "worker_tasks"))
