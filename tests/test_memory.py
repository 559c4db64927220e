"""Nothing is kept of a lock that was given back, in a process that lives for long."""

import gc
import sys

import pytest

from celery_pglock import AdvisoryTask, advisory
from tests.celery_app import app

pytestmark = [pytest.mark.usefixtures("pooled"), pytest.mark.long]

KEYS = 600
TIMES = 2000

# Blocks of Python's allocator: what is kept of each key would be thousands.
NOTHING_TO_SPEAK_OF = 300


def take_as_context(number):
    with advisory(f"growing:{number}"):
        pass


@advisory("growing")
def decorated():
    pass


def take_several(number):
    with advisory(f"growing:{number}", number, (1, number), timeout=1):
        pass


def take_slots(number):
    with advisory(f"growing:{number}", limit=3):
        pass


def take_by_hand(number):
    lock = advisory(f"by hand:{number}", shared=True)
    lock.acquire()
    lock.release()


@app.task(base=AdvisoryTask, lock_key="growing:{number}")
def task(number):
    pass


def blocks():
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.parametrize(
    ("take", "times"),
    [
        (take_as_context, TIMES),
        (lambda number: decorated(), KEYS),
        (take_several, KEYS),
        (take_slots, KEYS),
        (take_by_hand, KEYS),
        (lambda number: task.apply([number]), KEYS),
    ],
    ids=["with", "decorator", "several", "slots", "by hand", "task"],
)
def test_memory_does_not_grow_with_keys_or_with_acquisitions(take, times):
    for number in range(500):
        take(-number)
    before = blocks()
    for number in range(times):
        take(number % KEYS)
    assert blocks() - before < NOTHING_TO_SPEAK_OF
