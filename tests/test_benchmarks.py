"""The benchmarks compute what they say, and every lock that they compare can be taken."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connection

import benchmarks
from benchmarks import lock_contenders, report
from benchmarks.__main__ import MEASUREMENTS
from benchmarks.locks import CONTENDERS
from benchmarks.proxy import distant
from benchmarks.rounds import ContenderFailed, Quartiles, Rounds, interleaved
from benchmarks.tables import Table, Target
from tests.conftest import Rival

ROUNDS = Rounds({"floor": [1.0, 2.0, 4.0], "plain": [3.0, 5.0, 9.0], "locked": [5.0, 11.0, 13.0]})


def test_a_figure_is_the_median_of_the_rounds_between_their_quartiles() -> None:
    assert Quartiles.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Quartiles(2.0, 3.0, 4.0)
    assert ROUNDS.seconds("plain").median == 5.0


def test_a_ratio_is_of_figures_of_the_same_round() -> None:
    assert ROUNDS.ratio("plain", "floor").median == 2.5
    assert ROUNDS.ratio("locked", "floor", minus="plain") == Quartiles(1.5, 2.0, 2.5)


def test_contenders_take_turns_of_one_length_after_a_warm_up() -> None:
    turns: list[tuple[str, int]] = []

    def contender(name: str, mean: float) -> Callable[[int], float]:
        def run(operations: int) -> float:
            turns.append((name, operations))
            return operations * mean

        return run

    found = interleaved(
        {"fast": contender("fast", 0.001), "slow": contender("slow", 0.01)}, rounds=4, seconds=1
    )

    assert found.seconds("fast").median == pytest.approx(0.001)
    measured = turns[-8:]
    assert set(measured) == {("fast", 1000), ("slow", 100)}
    assert all({name for name, _ in measured[at : at + 2]} == {"fast", "slow"} for at in range(0, 8, 2))


def test_a_contender_that_fails_is_told_of_and_does_not_stop_the_others() -> None:
    def broken(operations: int) -> float:
        raise ContenderFailed("no such thing")

    found = interleaved({"floor": lambda operations: 1.0, "broken": broken}, rounds=2, operations=10)

    assert found.failures == {"broken": "no such thing"}
    assert found.has("floor")
    assert not found.has("broken")


def test_a_target_may_be_a_least() -> None:
    assert Target("ratio", 1.1, 1.15).is_met
    assert not Target("ratio", 1.2, 1.15).is_met
    assert not Target("fairness", 0.9, 0.99, at_least=True).is_met


def test_a_figure_and_its_unit_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    targets = [Target("one", 0.5, 1.0, "ms"), Target("other", 2.0, 1.0)]

    report.show([Table(name="t", title="T", columns=("a",), rows=[("b",)], targets=targets)])

    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "0.5", "ms", "≤", "1", "ms", "met"] in printed
    assert ["other", "2", "≤", "1", "MISSED"] in printed


def test_the_readme_tells_of_every_part() -> None:
    readme = (Path(benchmarks.__file__).parent / "README.md").read_text()
    assert [name for name in MEASUREMENTS if f"| `{name}` |" not in readme] == []


@contextmanager
def echo() -> Iterator[int]:
    """The port of a server that sends back what one connection sends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with listener.accept()[0] as one:
                while data := one.recv(100):
                    one.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_what_goes_through_the_proxy_arrives_late_and_whole() -> None:
    with echo() as port, distant(f"redis://127.0.0.1:{port}/0", round_trip=0.05) as (url,):
        host, _, nearby = url.removeprefix("redis://").removesuffix("/0").partition(":")
        with socket.create_connection((host, int(nearby)), 5) as client:
            started = time.monotonic()
            client.sendall(b"there and back")
            answer = client.recv(100)
            taken = time.monotonic() - started

    assert answer == b"there and back"
    assert taken >= 0.05


def test_a_library_that_is_not_installed_is_told_of_with_what_installs_it() -> None:
    with pytest.raises(ContenderFailed, match="make bench"):
        lock_contenders.peer("nobody_has_this")


# A contender's connection lives as long as its process.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.parametrize("function", CONTENDERS.values())
def test_every_lock_that_is_compared_can_be_taken_again_and_again(
    function: str, rival: Rival, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = rival.connection.info
    monkeypatch.setenv("DATABASE_URL", f"postgresql://{info.user}@{info.host}:{info.port}/{info.dbname}")
    monkeypatch.setenv("REDIS_URL", settings.CELERY_BROKER_URL)

    try:
        run = getattr(lock_contenders, function)()
    except ContenderFailed as failure:
        pytest.skip(str(failure))
    run(2)

    # While what it connected is still connected.
    assert rival.sees_advisory_locks() == 0
    assert not connection.in_atomic_block
