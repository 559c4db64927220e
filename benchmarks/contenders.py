"""Contenders in processes of their own, where neither one's patches nor its settings touch another.

``python -m benchmarks.contenders module:function`` calls the function once, and then what that gave, for each
number of operations that it reads; it answers with the seconds they took, in lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from benchmarks.rounds import ContenderFailed
from benchmarks.tables import Scale

END_SECONDS = 10.0


class Contender:
    """A process that does what ``target`` (``module:function``) gives as often as it is told."""

    def __init__(self, target: str, variables: Mapping[str, str]) -> None:
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **variables},
        )
        self._is_ready = False

    def __call__(self, operations: int) -> float:
        if not self._is_ready:
            self._answer()
            self._is_ready = True
        assert self._process.stdin
        try:
            self._process.stdin.write(f"{operations}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(self._last_words()) from None
        return float(self._answer()["seconds"])

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        # It may be in the middle of a turn.
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise ContenderFailed(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["ended without a word"])[-1]


@contextmanager
def contending(
    targets: Mapping[str, str],
    variables: Mapping[str, str],
    own_variables: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[dict[str, Contender]]:
    """A contender for each target, with these variables in the environment of all, and of each its own."""
    with ExitStack() as ends:
        contenders = {}
        for name, target in targets.items():
            contenders[name] = Contender(target, {**variables, **(own_variables or {}).get(name, {})})
            ends.callback(contenders[name].end)
        yield contenders


def variables_of(scale: Scale) -> dict[str, str]:
    """By which a process of this run finds its servers."""
    return {"DATABASE_URL": scale.database_url, "REDIS_URL": scale.redis_url}


def serve(target: str, orders: IO[str], answers: IO[str]) -> None:
    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        module, _, function = target.partition(":")
        run: Callable[[int], object] = getattr(importlib.import_module(module), function)()
        answer(ready=True)
        for line in orders:
            started = time.perf_counter()
            run(int(line))
            answer(seconds=time.perf_counter() - started)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    # An end in order: what it has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # What others print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
