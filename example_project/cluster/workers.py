"""What the cluster's workers are called, and how they are started."""

from __future__ import annotations

NAMES = ("north", "south")

# Each has a queue that is called as it is, and both take what comes by this one.
COMMON_QUEUE = "example_project"


def command(hostname: str, queue: str) -> list[str]:
    return [
        "celery",
        "--app=example_project",
        "worker",
        f"--hostname={hostname}",
        f"--queues={queue},{COMMON_QUEUE}",
        "--concurrency=2",
        "--loglevel=INFO",
        "--without-gossip",
        "--without-mingle",
    ]
