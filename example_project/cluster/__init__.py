"""Tests of the shop's tasks on clusters of real workers, by pytest-celery."""
