"""The Django app."""

from django.apps import AppConfig


class CeleryPglockConfig(AppConfig):
    name = "celery_pglock"
    verbose_name = "PostgreSQL locks of Celery tasks"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from celery_pglock import checks, hooks, installations, models, signals

        hooks.connect()
        checks.register()
        installations.heed_all_apps()
        signals.lock_skipped.connect(models.count_skip, dispatch_uid="celery_pglock.count_skip")
        signals.lock_lost.connect(models.count_loss, dispatch_uid="celery_pglock.count_loss")
