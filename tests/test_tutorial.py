"""The tutorial does what it says, from an empty folder on."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from example_project.servers import free_port
from tests.readers import Reader
from tests.servers import Cluster, broker

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


def built_wheel(folder):
    """What is installed from the package index otherwise: the code as it is here."""
    source = folder / "source"
    source.mkdir()
    # setuptools leaves its work beside the source.
    for name in ("celery_pglock", "pyproject.toml", "README.md", "LICENSE", "pytest_celery_pglock.py"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("celery_pglock-*.whl")
    return wheel


@pytest.mark.timeout(240)
def test_ten_minutes_are_as_they_are_told(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"celery-pglock @ {built_wheel(tmp_path).as_uri()}\n")
    with Cluster() as cluster, broker() as redis_url, psycopg.connect(cluster.url, autocommit=True) as superuser:
        ports = {"5432": cluster.port, "6379": redis_url.rsplit(":")[-1].split("/")[0], "8000": free_port()}
        known = {port: str(mine) for port, mine in ports.items()}
        # Compiling what is never imported takes a while.
        options = {"PIP_CONSTRAINT": str(constraints), "PIP_NO_COMPILE": "yes"}
        reader = Reader(folder, superuser.execute, known, **options)
        try:
            reader.follow((ROOT / "docs/tutorial/ten-minutes.md").read_text())
        finally:
            reader.close()
