"""The Django app."""

from django.apps import AppConfig


class CeleryPglockConfig(AppConfig):
    name = "celery_pglock"
    verbose_name = "PostgreSQL locks of Celery tasks"

    def ready(self) -> None:
        from celery_pglock import checks, hooks

        hooks.connect()
        checks.register()
