"""Requests that wait for their turn, through gRPC, with a client that plays the proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from extproc.core.types import End, Refusal, Reject, Turn, Wait
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import Server
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, configured, prompt, route
from tests.support.waiting import until

WAIT = Wait("t1", deadline=30.0)


class At:
    def __init__(self, server: Server, router: FakeRouter, stream: Stream) -> None:
        self.server, self.router, self.stream = server, router, stream

    async def held(self, mode: int = 2) -> None:
        """Sends a request, and sees that the proxy is asked for time; not in mode 4, where it measures none."""
        await self.stream.send(headers(CHAT, mode).SerializeToString())
        if mode == 2:
            await self.stream.ask()
        await self.stream.send(body(prompt(5)).SerializeToString())
        if mode == 2:
            answer = await self.stream.ask()
            assert answer is not None
            assert answer.override_message_timeout.ToSeconds() == 45
            assert answer.WhichOneof("response") is None
        await until(lambda: len(self.server.holding) == 1)

    def turn(self, *turns: Turn) -> None:
        self.router.due += turns
        self.server.holding.poke()


@asynccontextmanager
async def serving(router: FakeRouter | None = None) -> AsyncIterator[At]:
    router = router or FakeRouter([WAIT])
    config = configured({"a": [1]}, "127.0.0.1:21221")
    server = Server(config, Intake(router, config), router, time.monotonic)
    async with channel(await server.start()) as opened:
        yield At(server, router, Stream(opened))
        await server.stop(0)


@pytest.mark.parametrize("mode", [2, 4])
async def test_the_answer_comes_with_the_turn(mode: int) -> None:
    async with serving() as at:
        await at.held(mode)
        at.turn(Turn("t1", route(1, 2)))
        answer = await at.stream.ask()
        assert answer is not None
        assert answer.dynamic_metadata["envoy.lb"] == {"x-gateway-destination-endpoint": "127.0.0.1:1,127.0.0.1:2"}
        assert not at.router.finished
        assert not at.router.left


async def test_the_turn_may_be_a_refusal() -> None:
    async with serving() as at:
        await at.held()
        at.turn(Turn("t1", Reject(Refusal.DEADLINE, retry_after_s=7.2)))
        answer = await at.stream.ask()
        assert answer is not None
        assert answer.immediate_response.status.code == 429
        sent = {h.header.key: h.header.raw_value for h in answer.immediate_response.headers.set_headers}
        assert sent["retry-after"] == b"8"
        assert await at.stream.ask() is ENDED


async def test_a_client_that_leaves_frees_its_place() -> None:
    async with serving() as at:
        await at.held()
        at.stream.call.cancel()
        await until(lambda: at.router.left == ["t1"])
        assert len(at.server.holding) == 0
        assert at.router.finished == []


async def test_a_turn_that_meets_a_client_that_left_ends_its_flight() -> None:
    """The router has opened the flight; nobody else would report its end."""
    async with serving() as at:
        await at.held()
        task = next(t for t in asyncio.all_tasks() if "_process" in repr(t.get_coro()) or "Process" in repr(t))
        at.router.due.append(Turn("t1", route(1)))
        at.server.holding._ask()  # resolved, and before the stream goes on
        task.cancel()
        await until(lambda: [(f, o.end) for f, o, _ in at.router.finished] == [("f1", End.CLIENT_GONE)])
        assert at.router.left == []


async def test_the_router_is_asked_again_when_it_said() -> None:
    router = FakeRouter([WAIT], wakeup=time.monotonic() + 0.05)
    async with serving(router) as at:
        await at.held()
        at.router.due.append(Turn("t1", route(1)))  # and nobody pokes
        answer = await at.stream.ask()
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"


async def test_at_the_end_those_who_wait_are_let_go() -> None:
    async with serving() as at:
        await at.held()
        at.router.due.append(Turn("t1", route(1)))
        stopping = asyncio.ensure_future(at.server.stop(2.0))
        answer = await at.stream.ask()
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"
        await stopping
        assert await at.stream.code() == "OK"
