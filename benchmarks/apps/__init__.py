"""The Celery apps that are compared: a module for each kind of lock, so that nobody imports another's."""
