"""The Django app of the shop."""

from __future__ import annotations

from django.apps import AppConfig


class ShopConfig(AppConfig):
    name = "example_project.shop"
    # Its tables are cleared at every run: their names must be nobody else's.
    label = "pglock_example"

    def ready(self) -> None:
        from example_project.shop import listeners  # noqa: F401 - importing it connects the signals
