"""A TCP relay that can be cut: connections through it break, new ones are refused, until it is mended."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from tests.support.ports import free_port


class Wire:
    """From its own port to `target` (`ip:port`), for the length of a block."""

    def __init__(self, target: str) -> None:
        self.port = free_port()
        self._host, _, self._port = target.rpartition(":")
        self._server: asyncio.Server | None = None
        self._through: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.cut()

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._through:
            task.cancel()
        await asyncio.gather(*self._through, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._through.add(task)
        task.add_done_callback(self._through.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back: asyncio.StreamWriter | None = None
        try:
            there, back = await asyncio.open_connection(self._host, int(self._port))
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, back))
                both.create_task(_pump(there, writer))
        except* OSError:
            pass  # nobody there, or one side is gone: the other learns it by the close
        finally:
            for end in (writer, back):
                if end is not None:
                    end.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
        await target.drain()
    target.close()
