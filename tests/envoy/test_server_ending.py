"""How streams end when this process ends, or when the proxy ends them in the moment of the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from extproc.config import Config
from extproc.core.types import End, Fact, Outcome, Progressed
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.responses import EVERY_S
from extproc.envoy.rpc import EOF
from extproc.envoy.server import Server
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, configured, prompt, route
from tests.support.ports import free_port
from tests.support.waiting import until


def config(**envoy: Any) -> Config:
    made = configured({"a": [1]}, f"127.0.0.1:{free_port()}")
    return made.model_copy(update={"envoy": made.envoy.model_copy(update=envoy)})


class Cut:
    """An RPC whose answer to the body is cut off, or not, while it is written."""

    def __init__(self, cut: bool) -> None:
        self.messages = [headers(CHAT, 2), body(prompt(5))]
        self.cut = cut
        self.answers = 0

    async def read(self) -> Any:
        return self.messages.pop(0).SerializeToString() if self.messages else EOF

    async def write(self, message: bytes) -> None:
        self.answers += 1
        if self.cut and self.answers == 2:
            raise asyncio.CancelledError

    async def abort(self, code: Any, details: str) -> None:
        """Not used by streams."""


async def processed(settings: Config, context: Cut) -> tuple[Server, FakeRouter]:
    router = FakeRouter([route(1)])
    server = Server(settings, Intake(router, settings), router, time.monotonic)
    await asyncio.gather(asyncio.ensure_future(server._process(None, context)), return_exceptions=True)
    return server, router


def both_ways() -> Any:
    """The headers of a gateway whose responses go through us."""
    message = headers(CHAT, 4)
    message.protocol_config.response_body_mode = 4  # type: ignore[assignment]
    return message


async def test_a_flight_whose_response_would_go_through_us_ends_where_the_answer_is_cut_off() -> None:
    context = Cut(cut=True)
    context.messages, context.answers = [both_ways(), body(prompt(5))], 1
    server, router = await processed(config(), context)
    assert [(f, o.end) for f, o, _ in router.finished] == [("f1", End.CLIENT_GONE)]
    assert (len(server.responses), server.streams.failed) == (0, 0)


class Forgetful(FakeRouter):
    """Cannot take in what it is told."""

    def learn(self, fact: Fact, now: float) -> None:
        raise ZeroDivisionError("mistake")

    def finish(self, flight_id: str, outcome: Outcome, now: float) -> None:
        raise ZeroDivisionError("mistake")


async def test_a_mistake_in_the_books_does_not_break_off_a_response() -> None:
    settings = config()
    router = Forgetful([route(1)])
    server = Server(settings, Intake(router, settings), router, time.monotonic)
    try:
        async with channel(await server.start()) as opened:
            stream = Stream(opened)
            await stream.send(both_ways().SerializeToString())
            assert await stream.ask(body(prompt(5))) is not ENDED
            assert await stream.ask() is not ENDED, "the body"
            assert await stream.ask(ProcessingRequest(response_headers={})) is not ENDED
            for end in (False, True):
                assert (
                    await stream.ask(ProcessingRequest(response_body={"body": b"x", "end_of_stream": end})) is not ENDED
                )
        await until(lambda: len(server.responses) == 0)
        assert server.streams.failed == 2
    finally:
        await server.stop(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_response_that_is_awaited_is_told_of_though_it_is_silent() -> None:
    clock = Clock()
    settings, router = config(), FakeRouter([route(1)])
    server = Server(settings, Intake(router, settings), router, clock)
    try:
        async with channel(await server.start()) as opened:
            stream = Stream(opened)
            await stream.send(both_ways().SerializeToString())
            await stream.ask(body(prompt(5)))
            await stream.ask()
            for told in (1, 2):
                clock.now = told * EVERY_S
                await until(lambda told=told: len(router.learned) == told)  # type: ignore[misc]
    finally:
        await server.stop(0)
    assert [fact for fact, _ in router.learned] == [Progressed("f1", None, None, 0)] * 2


async def test_a_flight_whose_answer_was_cut_off_is_asked_after() -> None:
    """Whether the proxy has the answer, only its reports tell."""
    server, router = await processed(config(progress_interval_s=0.01, log_flush_interval_s=0.01), Cut(cut=True))
    assert router.finished == []
    await until(lambda: [(f, o.end) for f, o, _ in router.finished] == [("f1", End.CLIENT_GONE)])
    assert server.streams.abandoned == 1


@pytest.mark.parametrize(
    ("cut", "interval_s"), [(False, 0.01), (True, None)], ids=["delivered", "no reports to wait for"]
)
async def test_other_flights_are_left_to_the_access_log(cut: bool, interval_s: float | None) -> None:
    _, router = await processed(config(progress_interval_s=interval_s, log_flush_interval_s=0.01), Cut(cut))
    await asyncio.sleep(0.1)
    assert router.finished == []


@asynccontextmanager
async def half_way() -> AsyncIterator[tuple[Server, Stream]]:
    """A stream whose body has not come."""
    router = FakeRouter([route(1)])
    settings = config()
    server = Server(settings, Intake(router, settings), router, time.monotonic)
    async with channel(await server.start()) as opened:
        stream = Stream(opened)
        await stream.ask(headers(CHAT, 2))
        yield server, stream
        await server.stop(0)


async def test_a_stream_that_outlasts_the_grace_period_ends_well_all_the_same() -> None:
    """With OK, so that the proxy lets the request pass; an error would fail it where the proxy does not fail open."""
    async with half_way() as (server, stream):
        async with asyncio.timeout(10):
            await server.stop(1.0)
        assert await stream.ask() is ENDED
        assert await stream.code() == "OK"
        assert server.streams.cut == 1


async def test_a_stream_that_ends_by_itself_is_waited_for() -> None:
    async with half_way() as (server, stream):
        stopping = asyncio.ensure_future(server.stop(20.0))
        await asyncio.sleep(1.2)  # noticed, and no longer taking others
        answer = await stream.ask(body(prompt(5)))
        assert answer is not None
        assert "envoy.lb" in answer.dynamic_metadata
        async with asyncio.timeout(5):
            await stopping
        assert server.streams.cut == 0


async def test_hurry_ends_the_grace_period() -> None:
    async with half_way() as (server, stream):
        stopping = asyncio.ensure_future(server.stop(60.0))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        server.hurry()
        async with asyncio.timeout(5):
            await stopping
        assert await stream.code() == "OK"
