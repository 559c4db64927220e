"""What the tests of the cluster need, whichever nodes it is of."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing

import dj_database_url
import django
import docker
import pytest
from celery import Task
from celery.result import AsyncResult
from django.core.management import call_command
from django.db import connections
from docker.errors import DockerException
from pytest_celery import CeleryTestSetup, CeleryTestWorker

from example_project.cluster.workers import COMMON_QUEUE

os.environ["DJANGO_SETTINGS_MODULE"] = "example_project.cluster.settings"
# Celery prefers these to what pytest-celery configures its app with.
for variable in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
    os.environ.pop(variable, None)
django.setup()


def docker_answers() -> bool:
    try:
        with closing(docker.from_env(timeout=5)) as client:
            return bool(client.ping())
    except DockerException:
        return False


ROOMS = {"docker": "containers", "processes": "processes"}
NODES = os.environ.get("CLUSTER") or ("docker" if docker_answers() else "processes")
if NODES not in ROOMS:
    raise pytest.UsageError(f"CLUSTER is one of {', '.join(ROOMS)}, and not {NODES!r}.")
pytest_plugins = [f"example_project.cluster.{ROOMS[NODES]}"]


def pytest_report_header() -> str:
    return f"nodes: {NODES}"


@pytest.fixture(scope="session", autouse=True)
def _shop(database: dict[str, str]) -> None:
    """The shop's tables; what the tests write into them stays there."""
    for alias in connections:
        connections.settings[alias].update(dj_database_url.parse(database["host_url"]))
    call_command("migrate", verbosity=0)


@pytest.fixture
def worker_environment(
    database: dict[str, str], celery_worker_cluster_config: dict[str, dict[str, list[str]]]
) -> dict[str, str]:
    config = celery_worker_cluster_config
    return {
        "DJANGO_SETTINGS_MODULE": os.environ["DJANGO_SETTINGS_MODULE"],
        "DATABASE_URL": database["url"],
        "CELERY_BROKER_URL": config["celery_broker_cluster_config"]["urls"][0],
        "CELERY_RESULT_BACKEND": config["celery_backend_cluster_config"]["urls"][0],
    }


@pytest.fixture
def north(celery_setup: CeleryTestSetup) -> CeleryTestWorker:
    return celery_setup.worker_cluster[0]


@pytest.fixture
def south(celery_setup: CeleryTestSetup) -> CeleryTestWorker:
    return celery_setup.worker_cluster[1]


Send = Callable[..., AsyncResult]


@pytest.fixture
def send(celery_setup: CeleryTestSetup) -> Send:
    """Sends a task to one worker, or to whichever takes it first."""

    def send(task: Task, *args: object, to: CeleryTestWorker | None = None) -> AsyncResult:
        queue = to.worker_queue if to else COMMON_QUEUE
        return celery_setup.app.send_task(task.name, args, queue=queue)

    return send
