"""What a run was made on, and with which versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psycopg
import redis

from benchmarks.tables import Scale

PACKAGES = ("Django", "celery", "redis", "hiredis", "django-pglock", "celery-once", "celery-singleton")


def machine() -> dict[str, str]:
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{gibibytes:.0f} GiB",
        "system": f"{_system()}, {platform.machine()}",
    }


def versions(scale: Scale) -> dict[str, str]:
    with psycopg.connect(scale.database_url) as connection:
        postgresql = connection.info.parameter_status("server_version")
    with redis.from_url(scale.redis_url) as client:
        redis_server = client.info("server")["redis_version"]
    return {
        "Python": platform.python_version(),
        "PostgreSQL": str(postgresql),
        "Redis": str(redis_server),
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
        **{package: _version(package) for package in PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
