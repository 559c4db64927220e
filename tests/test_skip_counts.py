"""Skips are counted per key and hour."""

import time

from celery_pglock.models import SkipCount
from celery_pglock.testing import held_elsewhere
from tests.worker_tasks import skips


def test_skips_are_counted_per_key_task_and_hour(rival):
    with held_elsewhere("a", "b"):
        for key in "aab":
            skips.apply([key])
    skips.apply(["a"])
    assert set(SkipCount.objects.values_list("key", "task_name", "count")) == {
        ("a", skips.name, 2),
        ("b", skips.name, 1),
    }
    count = SkipCount.objects.get(key="a")
    assert (count.hour.minute, count.hour.second) == (0, 0)
    assert "skips: 2 for 'a'" in str(count)


def test_a_worker_counts_them(worker, rival):
    rival.take("k")
    assert skips.delay("k").get(timeout=10) == "skipped"
    assert SkipCount.objects.get(key="k").count == 1


def test_a_long_key_is_cut(rival):
    with held_elsewhere("x" * 10_000):
        assert skips.apply(["x" * 10_000]).get() == "skipped"
    assert SkipCount.objects.get().key == "x" * 200


def test_a_table_that_somebody_locks_does_not_hold_up_the_task(rival, caplog):
    started = time.monotonic()
    with rival.connection.transaction(), held_elsewhere("k"):
        rival.connection.execute("LOCK celery_pglock_skipcount IN ACCESS EXCLUSIVE MODE")
        assert skips.apply(["k"]).get() == "skipped"
    assert time.monotonic() - started < 5
    assert "Error calling count_skip" in caplog.text


def test_a_table_that_is_missing_is_told_with_the_cure(rival, caplog):
    rival.connection.execute("ALTER TABLE celery_pglock_skipcount RENAME TO elsewhere")
    try:
        with held_elsewhere("k"):
            assert skips.apply(["k"]).get() == "skipped"
    finally:
        rival.connection.execute("ALTER TABLE elsewhere RENAME TO celery_pglock_skipcount")
    assert "run manage.py migrate celery_pglock --database=default" in caplog.text
