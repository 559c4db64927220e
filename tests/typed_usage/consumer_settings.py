"""The Django settings of a project that uses the package."""

SECRET_KEY = "typed"
USE_TZ = True
INSTALLED_APPS = ["celery_pglock"]
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "consumer"}}
