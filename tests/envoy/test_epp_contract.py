"""The endpoint picker protocol message by message, with a client that plays the gateway. docs/interplay.md lists the rules and where each is tested."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from extproc.core.types import Refusal, Reject, Verdict
from extproc.envoy import names
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import Server
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from tests.envoy.client import ENDED, Stream, body, channel, headers
from tests.envoy.setup import CHAT, configured, prompt, route
from tests.support.ports import free_port

FULL_DUPLEX = 4
MOST_BYTES = 62_000
"""Of a body in one message: gateways take 64 KiB with what is around it."""


@asynccontextmanager
async def serving(*verdicts: Verdict, **requests: Any) -> AsyncIterator[tuple[Any, FakeRouter]]:
    """A channel to a server that gives these verdicts."""
    router = FakeRouter([*verdicts])
    config = configured({"a": [1]}, f"127.0.0.1:{free_port()}")
    config = config.model_copy(update={"requests": config.requests.model_copy(update=requests)})
    server = Server(config, Intake(router, config), router, time.monotonic)
    try:
        async with channel(await server.start()) as opened:
            yield opened, router
    finally:
        await server.stop(0)


def first(
    sent: dict[str, str] | None = None, *, path: str = CHAT, end: bool = False, both_ways: bool = False
) -> ProcessingRequest:
    """The message with the headers, as gateways send it."""
    message = headers(path, FULL_DUPLEX, end, "GET" if end else "POST")
    for key, value in (sent or {}).items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = key, value.encode()
    if both_ways:
        message.protocol_config.response_body_mode = FULL_DUPLEX  # type: ignore[assignment]
    return message


async def told(stream: Stream, *messages: ProcessingRequest) -> list[ProcessingResponse]:
    """All answers until the server ends the RPC."""
    for message in messages:
        await stream.send(message.SerializeToString())
    answers = []
    while (answer := await stream.ask()) is not ENDED:
        answers.append(answer)
    return answers


def set_headers(answer: ProcessingResponse) -> dict[str, str]:
    options = answer.request_headers.response.header_mutation.set_headers
    assert len({o.header.key for o in options}) == len(options), "no header twice"
    assert not any(o.header.value for o in options), "Envoy reads raw_value"
    return {o.header.key: o.header.raw_value.decode() for o in options}


@pytest.mark.parametrize("size", [2, MOST_BYTES, MOST_BYTES + 1, 1_300_000])
async def test_headers_are_answered_once_the_body_is_complete_then_the_body_in_pieces(size: int) -> None:
    sent = prompt(size)
    async with serving(route(1)) as (opened, router):
        stream = Stream(opened)
        await stream.send(first().SerializeToString())
        half = len(sent) // 2
        await stream.send(body(sent[:half], end=False).SerializeToString())
        assert router.arrived == [], "nothing is decided on half a body"
        head, *pieces = await told(stream, body(sent[half:], end=False), body(b"", end=True))
        assert head.WhichOneof("response") == "request_headers"
        assert {p.WhichOneof("response") for p in pieces} == {"request_body"}
        streamed = [p.request_body.response.body_mutation.streamed_response for p in pieces]
        assert b"".join(s.body for s in streamed) == sent
        assert max(len(s.body) for s in streamed) <= MOST_BYTES
        assert [s.end_of_stream for s in streamed] == [False] * (len(streamed) - 1) + [True]


async def test_the_pick_is_the_same_in_header_and_metadata() -> None:
    async with serving(route(1, 2)) as (opened, _):
        head = (await told(Stream(opened), first(), body(prompt(5))))[0]
        picked = "127.0.0.1:1,127.0.0.1:2"
        assert set_headers(head)[names.DESTINATION] == picked
        assert head.dynamic_metadata[names.LB_NAMESPACE] == {names.DESTINATION: picked}


async def test_a_destination_of_the_client_is_overwritten() -> None:
    async with serving(route(1)) as (opened, _):
        sent = first({names.DESTINATION: "10.9.9.9:80"})
        head = (await told(Stream(opened), sent, body(prompt(5))))[0]
        (option,) = head.request_headers.response.header_mutation.set_headers
        assert (option.header.key, option.append_action) == (names.DESTINATION, 2), "OVERWRITE_IF_EXISTS_OR_ADD"


async def test_a_body_that_is_changed_comes_with_its_length() -> None:
    async with serving(route(1)) as (opened, _):
        stream = Stream(opened)
        await stream.send(first(both_ways=True).SerializeToString())
        head = await stream.ask(body(prompt(5, stream=True)))
        piece = await stream.ask()
        assert head is not None
        assert piece is not None
        new = piece.request_body.response.body_mutation.streamed_response.body
        assert b"include_usage" in new
        assert set_headers(head)["content-length"] == str(len(new))


@pytest.mark.parametrize("size", [5, 2_000_000])
async def test_usage_is_not_asked_for_where_nobody_would_read_it(size: int) -> None:
    async with serving(route(1)) as (opened, _):
        sent = prompt(size, stream=True)
        _, *pieces = await told(Stream(opened), first(), body(sent))
        streamed = [p.request_body.response.body_mutation.streamed_response for p in pieces]
        assert b"".join(s.body for s in streamed) == sent


async def test_without_a_body_the_headers_are_answered_at_once() -> None:
    async with serving(route(1)) as (opened, _):
        (head,) = await told(Stream(opened), first(path="/v1/models", end=True))
        assert set_headers(head) == {names.DESTINATION: "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (Refusal.NO_REPLICAS, 503),
        (Refusal.SUBSET_EMPTY, 503),
        (Refusal.QUEUE_FULL, 429),
        (Refusal.UNKNOWN_MODEL, 404),
    ],
)
async def test_a_refusal_is_an_immediate_response_and_nothing_else(refusal: Refusal, status: int) -> None:
    async with serving(Reject(refusal)) as (opened, _):
        (answer,) = await told(Stream(opened), first(), body(prompt(5)))
        assert answer.immediate_response.status.code == status
        said = {o.header.key: o.header.raw_value for o in answer.immediate_response.headers.set_headers}
        assert said["content-type"] == b"application/json"
        assert ("retry-after" in said) == (status != 404)


async def test_of_the_response_every_piece_is_given_back_in_its_order() -> None:
    async with serving(route(1)) as (opened, _):
        stream = Stream(opened)
        await stream.send(first(both_ways=True).SerializeToString())
        assert await stream.ask(body(prompt(5))) is not ENDED
        assert await stream.ask() is not ENDED, "the body"
        head = ProcessingRequest(response_headers={})
        served = head.metadata_context.filter_metadata[names.LB_NAMESPACE].fields[names.SERVED]
        served.string_value = "127.0.0.1:1"
        answer = await stream.ask(head)
        assert answer is not None
        assert answer.WhichOneof("response") == "response_headers"
        for data, end in ((b"data: 1\n\n", False), (b"", True)):
            answer = await stream.ask(ProcessingRequest(response_body={"body": data, "end_of_stream": end}))
            assert answer is not None
            piece = answer.response_body.response.body_mutation.streamed_response
            assert (piece.body, piece.end_of_stream) == (data, end)


# --- what is read of the headers ---------------------------------------------------------------------------------------

OBJECTIVES = {"objectives": {"chat": 5, "batch": -1}}


@pytest.mark.parametrize(
    ("sent", "priority"),
    [
        ({"x-gateway-inference-objective": "chat"}, 5),
        ({"x-llm-d-inference-objective": "batch"}, -1),
        ({"x-llm-d-inference-objective": "batch", "x-gateway-inference-objective": "chat"}, -1),
        ({"x-gateway-inference-objective": "nobody-knows"}, 0),
        ({"x-gateway-inference-objective": "chat", "x-request-priority": "2"}, 2),
        ({"x-gateway-inference-objective": "chat", "x-request-priority": "high"}, 5),
        ({}, 0),
    ],
)
async def test_an_objective_gives_the_priority(sent: dict[str, str], priority: int) -> None:
    async with serving(route(1), **OBJECTIVES) as (opened, router):
        await told(Stream(opened), first(sent), body(prompt(5)))
        assert router.arrived[0][0].priority == priority


async def test_objectives_are_not_read_unless_they_are_configured() -> None:
    async with serving(route(1)) as (opened, router):
        await told(Stream(opened), first({"x-gateway-inference-objective": "chat"}), body(prompt(5)))
        assert router.arrived[0][0].priority == 0


async def test_a_fairness_id_is_a_tenant() -> None:
    async with serving(route(1), tenant_header="x-gateway-inference-fairness-id") as (opened, router):
        for who in ("acme", "acme", "other"):
            await told(Stream(opened), first({"x-gateway-inference-fairness-id": who}), body(prompt(5)))
        one, same, other = (request.tenant for request, _ in router.arrived)
        assert one == same != other


async def test_a_time_to_first_token_that_is_asked_for_is_read() -> None:
    async with serving(route(1)) as (opened, router):
        await told(Stream(opened), first({"x-slo-ttft-ms": "250"}), body(prompt(5)))
        assert router.arrived[0][0].slo_ttft_s == 0.25
