"""A proxy that puts a network between two programs of one host: what comes in leaves it later.

``python -m benchmarks.proxy SECONDS PORT ...`` listens on a port of its own for each of the given ones,
prints them in a line, and carries every byte so many seconds late, in both directions.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65536

# prctl's: by default Linux lets a thread oversleep by 50 microseconds.
PR_SET_TIMERSLACK = 29


@contextlib.contextmanager
def distant(*urls: str, round_trip: float) -> Iterator[list[str]]:
    """URLs by which these servers of this host are so many seconds away, there and back."""
    ports = [str(urlsplit(url).port) for url in urls]
    command = [sys.executable, "-m", __name__, str(round_trip / 2), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            nearby = process.stdout.readline().split()
            yield [_with_port(url, port) for url, port in zip(urls, nearby, strict=True)]
        finally:
            process.kill()


def _with_port(url: str, port: str) -> str:
    parts = urlsplit(url)
    host, _, _ = parts.netloc.rpartition(":")
    return urlunsplit(parts._replace(netloc=f"{host}:{port}"))


class Proxy:
    """Every connection to one of ``listeners``, in one thread."""

    def __init__(self, delay: float, listeners: dict[socket.socket, int]) -> None:
        self.delay = delay
        self.listeners = listeners
        self.others: dict[socket.socket, socket.socket] = {}
        # All are equally late, so the first to come is the first to leave.
        self.under_way: deque[tuple[float, socket.socket, bytes]] = deque()

    def serve(self) -> None:
        while True:
            patience = max(0.0, self.under_way[0][0] - time.monotonic()) if self.under_way else None
            # Unlike poll, it waits for less than a millisecond.
            readable, _, _ = select.select([*self.listeners, *self.others], [], [], patience)
            for one in readable:
                if one in self.listeners:
                    self._accept(one)
                elif one in self.others:
                    self._read(one)
            while self.under_way and self.under_way[0][0] <= time.monotonic():
                _, target, data = self.under_way.popleft()
                self._write(target, data)

    def _accept(self, listener: socket.socket) -> None:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", self.listeners[listener]))
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.others |= {near: far, far: near}

    def _read(self, one: socket.socket) -> None:
        try:
            data = one.recv(CHUNK)
        except OSError:
            data = b""
        other = self.others[one]
        self.under_way.append((time.monotonic() + self.delay, other, data))
        if not data:
            del self.others[one]

    def _write(self, target: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if data:
                target.sendall(data)
            else:
                target.shutdown(socket.SHUT_WR)


def main() -> None:
    delay, *ports = sys.argv[1:]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    listeners = {socket.create_server(("127.0.0.1", 0)): int(port) for port in ports}
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)
    Proxy(float(delay), listeners).serve()


if __name__ == "__main__":
    main()
