"""A TCP relay that keeps what goes through it: what a peer was really sent, whatever reads it there."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from tests.support.ports import free_port


class Relay:
    """From its own port to `target` (`ip:port`), for the length of a block."""

    def __init__(self, target: str) -> None:
        self.port = free_port()
        self.sent = bytearray()
        """Bytes that clients sent, of all connections."""
        self._host, _, self._port = target.rpartition(":")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, int(self._port))
        for one in (self._pump(reader, back, keep=True), self._pump(there, writer, keep=False)):
            task = asyncio.create_task(one)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, keep: bool) -> None:
        try:
            while data := await source.read(65536):
                if keep:
                    self.sent += data
                target.write(data)
                await target.drain()
        except OSError:
            pass  # one side is gone; the other learns it by the close
        finally:
            target.close()
