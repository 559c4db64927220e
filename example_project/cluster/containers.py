"""Nodes that are containers of Docker."""

from __future__ import annotations

import pytest
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestWorker,
    CeleryWorkerCluster,
    CeleryWorkerContainer,
    RedisTestBackend,
    RedisTestBroker,
)
from pytest_celery.defaults import DEFAULT_WORKER_CONTAINER_TIMEOUT
from pytest_docker_tools import build, container, fetch, fxtr, network
from pytest_docker_tools.wrappers import Container

from example_project.cluster import workers
from example_project.processes import PROJECT


class NorthContainer(CeleryWorkerContainer):
    @classmethod
    def worker_name(cls) -> str:
        return workers.NAMES[0]

    @classmethod
    def worker_queue(cls) -> str:
        return cls.worker_name()

    @classmethod
    def command(cls, *args: str, **kwargs: object) -> list[str]:
        return [*workers.command(f"{cls.worker_name()}@%h", cls.worker_queue()), *args]


class SouthContainer(NorthContainer):
    @classmethod
    def worker_name(cls) -> str:
        return workers.NAMES[1]


# For the whole session, as the database is: pytest-celery's own network is one test's.
default_pytest_celery_network = network(scope="session")

postgresql_image = fetch(repository="postgres:18")
postgresql_container = container(
    scope="session",
    image="{postgresql_image.id}",
    environment={"POSTGRES_HOST_AUTH_METHOD": "trust"},
    # In the place of the image's volume, which would be left behind.
    tmpfs={"/var/lib/postgresql": "rw"},
    ports={"5432/tcp": None},
    network="{default_pytest_celery_network.name}",
    timeout=60,
)

worker_image = build(
    path=str(PROJECT), dockerfile="example_project/cluster/Dockerfile", tag="celery-pglock/cluster"
)
north_container, south_container = (
    container(
        image="{worker_image.id}",
        environment=fxtr("worker_environment"),
        network="{default_pytest_celery_network.name}",
        command=cls.command(),
        wrapper_class=cls,
        timeout=DEFAULT_WORKER_CONTAINER_TIMEOUT,
    )
    for cls in (NorthContainer, SouthContainer)
)


@pytest.fixture(scope="session")
def database(postgresql_container: Container) -> dict[str, str]:
    host, port = postgresql_container.get_addr("5432/tcp")
    inside = postgresql_container.attrs["Config"]["Hostname"]
    return {
        "url": f"postgresql://postgres@{inside}:5432/postgres",
        "host_url": f"postgresql://postgres@{host}:{port}/postgres",
    }


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster(celery_redis_backend: RedisTestBackend) -> CeleryBackendCluster:
    return CeleryBackendCluster(celery_redis_backend)


@pytest.fixture
def celery_worker_cluster(
    north_container: NorthContainer, south_container: SouthContainer
) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(
        CeleryTestWorker(north_container, app=None), CeleryTestWorker(south_container, app=None)
    )
