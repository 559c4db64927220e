"""The Django settings of what is measured with our app installed."""

from __future__ import annotations


def set_up() -> None:
    import django
    from django.conf import settings

    from benchmarks import django_settings

    names = [name for name in dir(django_settings) if name.isupper()]
    settings.configure(
        **{name: getattr(django_settings, name) for name in names} | {"INSTALLED_APPS": ["celery_pglock"]}
    )
    django.setup()
