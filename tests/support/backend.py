"""A replica of a few lines: records what reaches it, answers what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiohttp import web

from extproc.adapters.pages import USER_AGENT
from tests.support.ports import free_port


@dataclass(frozen=True, slots=True)
class Received:
    """One request as the replica saw it; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


CHECKS = {"/health": 200, "/v1/models": 404}
"""Alive, and without a list of models: ready while it lives."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Backend:
    """HTTP on 127.0.0.1 for the length of a block. Without a handler it answers its own address as text.

    Whatever it answers, it passes the checks of extproc, which are not recorded.
    """

    def __init__(self, handler: Handler | None = None, *, port: int | None = None) -> None:
        self.port = port or free_port()
        self.received: list[Received] = []
        self._handler = handler or self._own_address
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("user-agent") == USER_AGENT and request.path in CHECKS:
            return web.Response(status=CHECKS[request.path])
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.method, request.path_qs, headers, await request.read()))
        return await self._handler(request)

    async def _own_address(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self.address)


async def stream(
    request: web.Request,
    pieces: Iterable[bytes],
    *,
    gap_s: float = 0.0,
    content_type: str = "text/event-stream; charset=utf-8",
) -> web.StreamResponse:
    """Answer with `pieces`, each its own HTTP chunk, `gap_s` apart: without a gap they may arrive as one."""
    response = web.StreamResponse(headers={"content-type": content_type})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
        await asyncio.sleep(gap_s)
    await response.write_eof()
    return response
