"""Tasks of a worker whose locks are counted by the recipes in the docs."""

import os

from tests.documents import python_block
from tests.losing_tasks import is_only_warned
from tests.worker_tasks import raises, retries, skips

__all__ = ["is_only_warned", "raises", "retries", "skips"]

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    # Each in a namespace of its own, as the modules that they are.
    METRICS = {"__name__": "shop.metrics"}
    TELEMETRY = {"__name__": "shop.telemetry"}
    exec(python_block("docs/how-to/metrics.md", "# shop/metrics.py"), METRICS)  # noqa: S102 - it is ours
    exec(python_block("docs/how-to/metrics.md", "# shop/telemetry.py"), TELEMETRY)  # noqa: S102
