"""A pytest coat for ``celery_pglock.testing``.

It is no module of the package: pytest imports it in every project where that is installed, and Celery and
Django would come with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(name="locks_off")
def _locks_off() -> Iterator[None]:
    """Run the test without any lock: no lock session is opened."""
    from celery_pglock.testing import locks_off

    with locks_off():
        yield


@pytest.fixture(autouse=True)
def _no_lock_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    # Fixtures of modules and sessions may hold locks for many tests.
    before = _leftovers().in_use() if _may_use_locks() else {}
    yield
    if _may_use_locks() and (left := _leftovers().clear_away(request.node.nodeid, before)):
        request.node.warn(left)


def _may_use_locks() -> bool:
    return "celery_pglock.pool" in sys.modules


def _leftovers() -> Any:
    from celery_pglock import leftovers

    return leftovers
