"""A TCP proxy that can be told to fail: to cut, to refuse, or to be a black hole.

``python -m tests.faults.proxy PORT`` listens on a port that it prints, passes everything on to PORT, and
takes orders from its standard input. It ends with whoever gave it the orders.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

# Closing sends a reset at once, and nothing that was still to be sent.
RESET = struct.pack("ii", 1, 0)

DROP = "heal without what was swallowed"

STOP_SECONDS = 5.0


class Proxy:
    """A proxy in a process of its own, from ``with`` on."""

    port: int

    def __init__(self, target: int) -> None:
        self.target = target

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.proxy", str(self.target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for whoever gives the orders.
            start_new_session=True,
        )
        self.port = int(self._answer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cut(self) -> None:
        """Reset every connection; new ones are welcome."""
        self._order("cut")

    def refuse(self) -> None:
        """Reset every connection, and each new one, until it is healed."""
        self._order("refuse")

    def black_hole(self) -> None:
        """Take everything and pass nothing on, in both directions, until it is healed."""
        self._order("black hole")

    def heal(self, *, deliver: bool = True) -> None:
        """Pass on again: what was swallowed comes late, or its connections are reset."""
        self._order("heal" if deliver else DROP)

    def _order(self, order: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n".encode())
        self._process.stdin.flush()
        answer = self._answer()
        assert answer == order, answer

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()


class _Relay:
    """The connections, and what happens to them."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.is_passing = asyncio.Event()
        self.is_passing.set()
        self.is_refusing = False
        self.writers: set[asyncio.StreamWriter] = set()

    def obey(self, order: str) -> None:
        if order == "black hole":
            self.is_passing.clear()
            return
        self.is_refusing = order == "refuse"
        swallowed = not self.is_passing.is_set()
        if order in ("cut", "refuse") or (order == DROP and swallowed):
            for writer in list(self.writers):
                _reset(writer)
        self.is_passing.set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            _reset(writer)
            return
        mine = {writer}
        self.writers |= mine
        try:
            # In a black hole even the handshake is taken by somebody on the way.
            await self.is_passing.wait()
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
            mine.add(server_writer)
            self.writers.add(server_writer)
            if writer.is_closing():
                return
            await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))
        except (OSError, asyncio.CancelledError):
            # One side was reset, so the other is; or the proxy ends.
            for one in mine:
                _reset(one)
        finally:
            self.writers -= mine
            for one in mine:
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # In a black hole the kernel goes on taking, and acknowledging, what little a session sends.
        while data := await reader.read(65536):
            await self.is_passing.wait()
            writer.write(data)
            await writer.drain()
        await self.is_passing.wait()
        if not writer.is_closing():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def _serve(target: int) -> None:
    relay = _Relay(target)
    server = await asyncio.start_server(relay.connected, "127.0.0.1", 0, backlog=500)
    _say(str(server.sockets[0].getsockname()[1]))
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    while line := await orders.readline():
        order = line.decode().strip()
        relay.obey(order)
        # Resets are done before the order is answered.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        _say(order)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    asyncio.run(_serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
