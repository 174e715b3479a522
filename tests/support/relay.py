"""A TCP relay: it can be cut and mended, be slow, answer nonsense itself, and keep what goes through it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.support.ports import free_port


class Relay:
    """From its own port of loopback to `target` (`ip:port`), for the length of a block."""

    def __init__(self, target: str, answer: bytes | None = None, keep: bool = False) -> None:
        """`answer`: say this to whatever comes, end the connection, and ask nobody. It, `target` and `delay_s` may be changed."""
        self.port, self.target, self.answer = free_port(), target, answer
        self.delay_s = 0.0
        """Each piece of an answer waits so long."""
        self.sent = bytearray()
        """With `keep`: what clients sent, of all connections."""
        self._keep = keep
        self._server: asyncio.Server | None = None
        self._through: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<relay {self.port} to {self.target}: {len(self._through)} connections>"

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.cut()

    async def mend(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Break all connections, and refuse new ones until it is mended."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.drop()

    async def drop(self) -> None:
        """Break all connections; new ones may come."""
        for task in self._through:
            task.cancel()
        await asyncio.gather(*self._through, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._through.add(task)
        task.add_done_callback(self._through.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        with suppress(OSError):
            try:
                if self.answer is not None:
                    await reader.read(1)
                    writer.write(self.answer)
                    return
                host, _, port = self.target.rpartition(":")
                there, back = await asyncio.open_connection(host, int(port))
                ends.append(back)
                await self._both(
                    asyncio.create_task(self._asks(reader, back)), asyncio.create_task(self._answers(there, writer))
                )
            finally:
                for end in ends:
                    end.close()

    async def _both(self, *pumps: asyncio.Task[None]) -> None:
        """Until one of them ends."""
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _asks(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if self._keep:
                self.sent += data
            target.write(data)
            await target.drain()

    async def _answers(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await asyncio.sleep(self.delay_s)
            target.write(data)
            await target.drain()
