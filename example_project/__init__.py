"""A shop's back office, whose tasks show what locks are for."""

# `celery -A example_project` finds the app in celery.py by itself. Importing it here would put our
# DJANGO_SETTINGS_MODULE into the environment of every command that servers.py runs.
