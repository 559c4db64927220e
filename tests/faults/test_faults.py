"""A short run under fault: the lock holds, and what does not hold is found out."""

import signal
import subprocess
import sys

import pytest

from tests.faults.workers import PROJECT

# It starts its own servers and workers, and waits at the end until all queues are empty.
PATIENCE = 110


def soak(mode, seconds, seed):
    """The exit code of a run, and what it said."""
    command = [sys.executable, "-m", "tests.faults.soak", "--mode", mode, "--seed", str(seed)]
    process = subprocess.Popen(
        [*command, "--minutes", str(seconds / 60)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, said
    finally:
        # It ends what it has started.
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.long
@pytest.mark.parametrize("mode", ["strict", "default"])
def test_under_fault_nothing_overlaps_and_nothing_is_lost(mode):
    code, said = soak(mode, seconds=9, seed=3)
    assert code == 0, said


@pytest.mark.long
def test_a_lock_that_is_trusted_blindly_is_found_out():
    code, said = soak("naive", seconds=60, seed=3)
    assert code == 0, said
