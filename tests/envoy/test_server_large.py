"""Large bodies, and too many of them, through gRPC with a client that plays the proxy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from extproc.core.types import Blocks, Refusal, Reject, Request, Turn, Wait
from extproc.envoy import server as shell
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.reading import AtOnce, FakeReader, Reader
from extproc.envoy.server import Server
from extproc.openai.errors import BadRequest
from extproc.openai.reading import NotRead, Reading, Task, perform
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, configured, prompt, route
from tests.support.waiting import until

LARGE = prompt(3000, stream=True)
SMALL = prompt(5)


class At:
    def __init__(self, server: Server, router: FakeRouter, reader: Any, opened: Any) -> None:
        self.server, self.router, self.reader, self.channel = server, router, reader, opened

    async def stream(self, mode: int = 2) -> Stream:
        """One whose headers are through."""
        stream = Stream(self.channel)
        await stream.send(headers(CHAT, mode).SerializeToString())
        if mode == 2:
            await stream.ask()
        return stream

    async def sent(self, data: bytes = LARGE, mode: int = 2) -> Stream:
        """One whose body is being read."""
        stream = await self.stream(mode)
        before = len(self.reader.asked)
        await stream.send(body(data).SerializeToString())
        if mode == 2:  # in mode 4 the proxy measures no time
            answer = await stream.ask()
            assert answer is not None
            assert answer.override_message_timeout.ToSeconds() == 45
        await until(lambda: len(self.reader.asked) > before)
        return stream


@asynccontextmanager
async def serving(router: FakeRouter | None = None, reader: Reader | None = None, **requests: Any) -> AsyncIterator[At]:
    router, reader = router or FakeRouter([route(1, 2)]), reader or FakeReader()
    config = configured({"a": [1]}, "127.0.0.1:21222")
    limits = {"large_body_bytes": 2048, **requests}
    config = config.model_copy(update={"requests": config.requests.model_copy(update=limits)})
    server = Server(config, Intake(router, config), router, time.monotonic, reader=reader)
    address = await server.start()
    try:
        async with channel(address) as opened:
            yield At(server, router, reader, opened)
        await until(lambda: not server._open)
        assert server.buffers.held == 0
    finally:
        await server.stop(0)


def reading(data: bytes = LARGE) -> Reading:
    return perform(Task("POST", CHAT, Intake(FakeRouter(), configured({"a": [1]}))._limits, True), data)


@pytest.mark.parametrize("mode", [2, 4])
async def test_a_large_body_is_read_elsewhere(mode: int) -> None:
    async with serving() as at:
        stream = await at.sent(mode=mode)
        ((task, data),) = at.reader.asked
        assert (task.method, task.path, task.wants_usage, data) == ("POST", CHAT, True, LARGE)
        at.reader.give(reading())
        answer = await stream.ask()
        assert answer is not None
        assert answer.dynamic_metadata["envoy.lb"] == {"x-gateway-destination-endpoint": "127.0.0.1:1,127.0.0.1:2"}
        ((request, _),) = at.router.arrived
        assert (request.model, request.body_bytes) == ("m", len(LARGE))
        if mode == 2:
            sent = orjson.loads(answer.request_body.response.body_mutation.body)
            assert sent == {**orjson.loads(LARGE), "stream_options": {"include_usage": True}}


async def test_a_small_one_is_read_here_at_once() -> None:
    async with serving() as at:
        stream = await at.stream()
        answer = await stream.ask(body(SMALL))
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"
        assert at.reader.asked == []


async def test_others_are_answered_meanwhile() -> None:
    async with serving() as at:
        slow = await at.sent()
        quick = await at.stream()
        assert await quick.ask(body(SMALL)) is not ENDED
        at.reader.give(reading())
        assert await slow.ask() is not ENDED


async def test_what_the_body_says_may_be_a_refusal() -> None:
    async with serving() as at:
        stream = await at.sent()
        at.reader.give(Reading(BadRequest("no")))
        answer = await stream.ask()
        assert answer is not None
        assert answer.immediate_response.status.code == 400
        assert at.router.arrived == []


async def test_where_nobody_is_free_to_read_it_the_client_is_told_to_come_again() -> None:
    async with serving() as at:
        stream = await at.sent()
        at.reader.give(NotRead.BUSY)
        answer = await stream.ask()
        assert answer is not None
        assert answer.immediate_response.status.code == 503
        assert b"too many requests in progress" in answer.immediate_response.body
        assert (at.server.streams.refused, at.server.streams.overloaded) == (1, 1)


async def test_where_nobody_can_be_started_the_request_passes_unrouted(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as at:
        stream = await at.sent()
        at.reader.give(NotRead.FAILED)
        answer = await stream.ask()
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"
        assert not answer.HasField("dynamic_metadata")
        assert at.server.streams.failed == 1
    assert "could not be read" in caplog.text


async def test_a_client_that_leaves_frees_everything() -> None:
    async with serving() as at:
        stream = await at.sent()
        assert at.server.buffers.held == len(LARGE)
        stream.call.cancel()
        await until(lambda: at.reader.cancelled == 1)
        await until(lambda: at.server.buffers.held == 0)
        assert (at.router.arrived, at.router.finished) == ([], [])


async def test_one_that_was_read_may_have_to_wait_for_its_turn() -> None:
    """And the proxy is not asked for time again: it would not listen."""
    async with serving(FakeRouter([Wait("t1", 30.0)])) as at:
        stream = await at.sent()
        at.reader.give(reading())
        await until(lambda: len(at.server.holding) == 1)
        assert at.server.buffers.held == len(LARGE)
        at.router.due.append(Turn("t1", route(1)))
        at.server.holding.poke()
        answer = await stream.ask()
        assert answer is not None
        assert answer.request_body.response.body_mutation.body != b""


async def test_a_reader_that_breaks_lets_the_request_pass() -> None:
    class Broken:
        async def read(self, task: Task, body: bytes | memoryview) -> Reading:
            raise ZeroDivisionError

    async with serving(reader=Broken()) as at:
        stream = await at.stream()
        await stream.ask(body(LARGE))
        assert await stream.ask() is ENDED
        assert await stream.code() == "OK"
        assert at.server.streams.failed == 1


async def test_without_a_reader_it_is_read_in_place() -> None:
    async with serving(reader=AtOnce()) as at:
        stream = await at.stream()
        await stream.ask(body(LARGE))
        assert await stream.ask() is not ENDED


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_bodies_above_the_bound_on_all_of_them_are_refused() -> None:
    async with serving(max_buffered_bytes=2 * len(LARGE) - 1) as at:
        first = await at.sent()
        second = await at.stream()
        answer = await second.ask(body(LARGE))
        assert answer is not None
        assert answer.immediate_response.status.code == 503
        sent = {h.header.key: h.header.raw_value for h in answer.immediate_response.headers.set_headers}
        assert sent["retry-after"] == b"1"
        assert await second.ask() is ENDED
        assert (at.server.streams.overloaded, len(at.reader.asked)) == (1, 1)
        at.reader.give(reading())
        assert await first.ask() is not ENDED
        await until(lambda: at.server.buffers.held == 0)
        await at.sent()


async def test_pieces_are_counted_as_they_come_and_not_twice() -> None:
    async with serving(max_buffered_bytes=len(LARGE)) as at:
        stream = await at.stream(mode=4)
        await stream.send(body(LARGE[:1000], end=False).SerializeToString())
        await until(lambda: at.server.buffers.held == 1000)
        await stream.send(body(LARGE[1000:]).SerializeToString())
        await until(lambda: at.reader.asked)
        assert at.server.buffers.held == len(LARGE)
        at.reader.give(reading())
        while await stream.ask() is not ENDED:
            pass


async def test_a_body_that_only_passes_is_not_held() -> None:
    async with serving(max_buffered_bytes=1024) as at:
        stream = Stream(at.channel)
        await stream.ask(headers("/tokenize", mode=4))
        for _ in range(3):
            assert await stream.ask(body(b"x" * 1000, end=False)) is not ENDED
            assert at.server.buffers.held == 0
        stream.call.cancel()


async def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "MAX_STREAMS", 2)
    async with serving() as at:
        open_ones = [await at.stream() for _ in range(2)]
        answer = await Stream(at.channel).ask()
        assert answer is not None
        assert answer.immediate_response.status.code == 503
        for stream in open_ones:
            stream.call.cancel()
        await until(lambda: not at.server._open)
        assert await (await at.stream()).ask(body(SMALL)) is not ENDED


@pytest.mark.parametrize("large", [100, 1 << 20], ids=["elsewhere", "in place"])
async def test_depth_and_blocks_are_bounded_by_the_configuration(large: int) -> None:
    async with serving(reader=AtOnce(), large_body_bytes=large, max_json_depth=8, max_prompt_blocks=16) as at:
        deep = await at.stream()
        answer = await deep.ask(body(b'{"model":"m","messages":[],"x":' + b"[" * 8 + b"]" * 8 + b"}"))
        while answer is not None and answer.HasField("override_message_timeout"):
            answer = await deep.ask()
        assert answer is not None
        assert answer.immediate_response.status.code == 400
        assert b"deeper than 8 levels" in answer.immediate_response.body
        long = await at.stream()
        await long.ask(body(prompt(100_000)))
        await until(lambda: at.router.arrived)
        request: Request = at.router.arrived[0][0]
        assert isinstance(request.blocks, Blocks)
        assert len(request.blocks) == 16


def test_the_refusal_is_one_of_the_list() -> None:
    assert shell.OVERLOADED.error.status == 503
    assert Reject(Refusal.OVERLOADED).refusal == "overloaded"
    assert asyncio.iscoroutinefunction(FakeReader().read)
