"""The gRPC shell, with a client that plays the proxy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.core.types import End, Refusal, Reject, Request, Verdict
from extproc.envoy.exchange import Answer, Data, Head, Steer
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import COMPLAINT_INTERVAL_S, Complaints, Server
from tests.envoy.client import ENDED, Stream, body, channel, headers, log_stream
from tests.envoy.lab import until
from tests.envoy.setup import CHAT, configured, prompt, route

FIXTURES = Path(__file__).parents[1] / "fixtures" / "access_log"
LIMIT = 4096
pools = {"a": [1]}


class Broken(FakeRouter):
    def arrive(self, request: Request, now: float) -> Verdict:
        raise ZeroDivisionError("mistake")


class At:
    def __init__(self, server: Server, router: FakeRouter, opened: Any, address: str) -> None:
        self.server, self.router, self.channel, self.address = server, router, opened, address

    def stream(self) -> Stream:
        return Stream(self.channel)


@asynccontextmanager
async def serving(
    router: FakeRouter | None = None, listen: str = "127.0.0.1:21220", limit: int = LIMIT
) -> AsyncIterator[At]:
    router = router or FakeRouter([route(1, 2)])
    config = configured(pools, listen)
    config = config.model_copy(update={"requests": config.requests.model_copy(update={"max_body_bytes": limit})})
    server = Server(config, Intake(router, config), router, time.monotonic)
    address = await server.start()
    try:
        async with channel(address) as opened:
            yield At(server, router, opened, address)
    finally:
        await server.stop(0)


async def test_buffered_conversation() -> None:
    async with serving() as at:
        stream = at.stream()
        first = await stream.ask(headers(CHAT))
        assert first is not None
        assert first.WhichOneof("response") == "request_headers"
        second = await stream.ask(body(prompt(5)))
        assert second is not None
        assert second.dynamic_metadata["envoy.lb"] == {"x-gateway-destination-endpoint": "127.0.0.1:1,127.0.0.1:2"}
        assert await stream.ask() is ENDED
        assert await stream.code() == "OK"
        assert (at.server.streams.opened, at.server.streams.steered) == (1, 1)
        assert at.router.finished == []


async def test_the_clock_is_the_one_given() -> None:
    router = FakeRouter([route(1)])
    config = configured(pools, "127.0.0.1:21220")
    server = Server(config, Intake(router, config), router, lambda: 42.0)
    async with channel(await server.start()) as opened:
        await Stream(opened).ask(headers("/v1/models", end=True, method="GET"))
    await server.stop(0)
    assert [now for _, now in router.arrived] == [42.0]


async def test_a_refusal_reaches_the_client() -> None:
    async with serving(FakeRouter([Reject(Refusal.NO_REPLICAS)])) as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        answer = await stream.ask(body(prompt(5)))
        assert answer is not None
        assert answer.immediate_response.status.code == 503
        assert await stream.ask() is ENDED
        assert at.server.streams.refused == 1


async def test_a_message_above_the_limit_is_taken_and_refused() -> None:
    """With a body just over the limit: gRPC must not cut it off before we can answer 413."""
    async with serving() as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        answer = await stream.ask(body(b"x" * (LIMIT + 1)))
        assert answer is not None
        assert answer.immediate_response.status.code == 413


async def test_a_large_body_is_not_cut_by_grpc_defaults() -> None:
    async with serving(limit=8 << 20) as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        first = await stream.ask(body(prompt(6 << 20)))
        assert first is not None
        assert first.override_message_timeout.seconds == 45
        answer = await stream.ask()
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"


@pytest.mark.parametrize("raw", [b"\xff\xff", b""])
async def test_what_cannot_be_read_ends_the_rpc_with_ok(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as at:
        stream = at.stream()
        await stream.send(raw)
        assert await stream.ask() is ENDED
        assert await stream.code() == "OK"
        assert at.server.streams.unexpected == 1
    assert "passes unrouted" in caplog.text


async def test_what_cannot_come_ends_the_rpc_with_ok() -> None:
    async with serving() as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        assert await stream.ask(headers(CHAT)) is ENDED
        assert await stream.code() == "OK"
        assert at.server.streams.unexpected == 1


async def test_a_mistake_in_the_decision_lets_the_request_pass(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Broken()) as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        answer = await stream.ask(body(prompt(5)))
        assert answer is not None
        assert answer.WhichOneof("response") == "request_body"
        assert not answer.HasField("dynamic_metadata")
        assert await stream.ask() is ENDED
        assert await stream.code() == "OK"
        assert at.server.streams.failed == 1
    assert "ZeroDivisionError" in caplog.text


async def test_a_proxy_that_leaves_early_leaves_nothing_behind() -> None:
    async with serving() as at:
        cancelled, closed = at.stream(), at.stream()
        for stream in (cancelled, closed):
            await stream.ask(headers(CHAT))
        cancelled.call.cancel()
        await closed.call.done_writing()
        assert await closed.ask() is ENDED
        assert await closed.code() == "OK"
        again = at.stream()
        assert await again.ask(headers("/v1/models", end=True)) is not ENDED
        assert at.router.finished == []
        assert (at.server.streams.unexpected, at.server.streams.failed) == (0, 0)


async def test_an_answer_that_cannot_be_written_abandons_its_flight() -> None:
    class Unwritable(Intake):
        def decide(self, head: Head, body: Data | None, now: float, rewritable: bool = False) -> Answer:
            super().decide(head, body, now, rewritable)
            return Steer("f1", None)  # type: ignore[arg-type]

    router = FakeRouter([route(1)])
    config = configured(pools, "127.0.0.1:21220")
    server = Server(config, Unwritable(router, config), router, time.monotonic)
    async with channel(await server.start()) as opened:
        stream = Stream(opened)
        assert await stream.ask(headers("/v1/models", end=True)) is ENDED
        assert await stream.code() == "OK"
    await server.stop(0)
    assert [(flight, outcome.end) for flight, outcome, _ in router.finished] == [("f1", End.CLIENT_GONE)]
    assert (server.streams.failed, server.streams.abandoned, server.streams.steered) == (1, 1, 0)


async def test_full_duplex_gives_back_every_byte() -> None:
    async with serving(limit=1 << 20) as at:
        stream, data = at.stream(), prompt(200_000)
        await stream.send(headers(CHAT, mode=4).SerializeToString())
        await stream.send(body(data[:70_000], end=False).SerializeToString())
        first = await stream.ask(body(data[70_000:]))
        assert first is not None
        assert first.WhichOneof("response") == "request_headers"
        pieces = []
        while (answer := await stream.ask()) is not ENDED:
            pieces.append(answer.request_body.response.body_mutation.streamed_response)
        assert b"".join(p.body for p in pieces) == data
        assert [p.end_of_stream for p in pieces] == [False] * (len(pieces) - 1) + [True]


async def test_a_gateway_that_routes_by_itself_has_no_way_to_a_provider(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(FakeRouter([route()])) as at:
        stream = at.stream()
        await stream.send(headers(CHAT, mode=4).SerializeToString())
        answer = await stream.ask(body(prompt(5)))
        assert answer is not None
        assert answer.immediate_response.status.code == 500
        assert b"no way to the provider" in answer.immediate_response.body
        assert await stream.ask() is ENDED
        assert [outcome.end for _, outcome, _ in at.router.finished] == [End.CLIENT_GONE]
        assert (at.server.streams.refused, at.server.streams.steered) == (1, 0)
    assert "only the bootstrap of `extproc envoy` leads to one" in caplog.text


# --- access log -------------------------------------------------------------------------------------------------------


async def test_the_access_log_reaches_the_router() -> None:
    async with serving() as at:
        call = log_stream(at.channel)
        await call.write(b"\xff")
        await call.write((FIXTURES / "json.bin").read_bytes())
        await until(lambda: at.router.finished)
        await call.done_writing()
        assert await call == b""
        assert (at.server.entries.finished, at.server.entries.unreadable) == (1, 1)


async def test_a_mistake_in_one_entry_does_not_end_the_stream() -> None:
    class Refusing(FakeRouter):
        def finish(self, flight_id: str, outcome: Any, now: float) -> None:
            raise ZeroDivisionError("mistake")

    async with serving(Refusing()) as at:
        call = log_stream(at.channel)
        for _ in range(2):
            await call.write((FIXTURES / "json.bin").read_bytes())
        await until(lambda: at.server.entries.failed == 2)


# --- starting and stopping --------------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with serving():
        with pytest.raises(RuntimeError):
            async with serving():
                pass


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with serving(listen=f"unix:{tmp_path}/g.sock") as at:
        assert at.address == f"unix:{tmp_path}/g.sock"
        assert await at.stream().ask(headers("/v1/models", end=True)) is not ENDED


async def test_stopping_waits_for_streams_but_not_for_the_access_log() -> None:
    async with serving() as at:
        stream, logs = at.stream(), log_stream(at.channel)
        await stream.ask(headers(CHAT))
        await logs.write((FIXTURES / "json.bin").read_bytes())
        await until(lambda: at.router.finished)
        stopping = asyncio.ensure_future(at.server.stop(20.0))
        await until(lambda: "not serving" in repr(at.server.health))
        assert await stream.ask(body(prompt(5))) is not ENDED
        async with asyncio.timeout(5):
            await stopping


async def test_stopping_does_not_wait_longer_than_the_grace() -> None:
    async with serving() as at:
        stream = at.stream()
        await stream.ask(headers(CHAT))
        begun = time.monotonic()
        await at.server.stop(0.2)
        assert time.monotonic() - begun < 5


def test_complaints_are_kept_apart_and_rare(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    complaints = Complaints(lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for at in (0.0, COMPLAINT_INTERVAL_S / 2, COMPLAINT_INTERVAL_S):
            now[0] = at
            complaints.about("a", at)
        complaints.about("b", "once")
    assert [r.getMessage() for r in caplog.records] == ["a: 0.0", "a: 10.0", "b: once"]
