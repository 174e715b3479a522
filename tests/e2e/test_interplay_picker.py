"""The endpoint picker protocol behind a real Envoy that is configured as gateways configure theirs. docs/interplay.md lists the rules."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from google.protobuf.struct_pb2 import ListValue, Value

from extproc.core.types import Usage
from extproc.envoy import names
from tests.e2e.gateway import ORIGINAL_DST, OVERRIDE_HOST, SUBSET_HEADER, SUBSET_LIST_HEADER, gateway
from tests.e2e.stack import Stack, chat, replica
from tests.support.backend import Backend
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

SHAPES = pytest.mark.parametrize("shape", [ORIGINAL_DST, OVERRIDE_HOST])


def echo(name: str) -> Any:
    """A replica that tells what arrived."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        seen = {"name": name, "sha256": hashlib.sha256(body).hexdigest(), "headers": [*request.headers.items()]}
        return web.json_response(seen)

    return handle


@asynccontextmanager
async def two(directory: Path, shape: str, **sections: Any) -> AsyncIterator[tuple[Stack, dict[str, str]]]:
    """A gateway before two replicas that tell what arrived; beside it, who has which address."""
    async with Backend(echo("a")) as a, Backend(echo("b")) as b:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address, b.address]}
        async with gateway(directory, shape, pool, **sections) as running:
            yield running, {"a": a.address, "b": b.address}


async def asked(running: Stack, body: Any = None, **options: Any) -> Any:
    async with running.post(body, **options) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def values(seen: Any, name: str) -> list[str]:
    return [value for key, value in seen["headers"] if key.lower() == name]


# --- the destination --------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("size", [10, 100_000, 2_500_000])
async def test_the_pick_is_where_it_arrives_and_header_and_body_are_whole(
    tmp_path: Path, shape: str, size: int
) -> None:
    async with two(tmp_path, shape) as (running, addresses):
        body = json.dumps(chat("word " * (size // 5))).encode()
        seen = await asked(running, body)
        picked = running.last().decision.endpoints[0]
        assert addresses[seen["name"]] == picked
        assert values(seen, names.DESTINATION) == [picked], "once, and the same as in the metadata"
        assert seen["sha256"] == hashlib.sha256(body).hexdigest()


@SHAPES
async def test_a_client_cannot_choose_the_destination(tmp_path: Path, shape: str) -> None:
    async with two(tmp_path, shape) as (running, addresses), Backend(echo("elsewhere")) as elsewhere:
        both = [(names.DESTINATION, elsewhere.address), (names.DESTINATION, elsewhere.address), ("x-own", "1")]
        for _ in range(4):
            async with running.client.post(f"{running.url}/v1/chat/completions", json=chat(), headers=both) as response:
                seen = await response.json()
            assert seen["name"] in addresses
            assert values(seen, names.DESTINATION) == [addresses[seen["name"]]]
            assert values(seen, "x-own") == ["1"], "the client's own headers stay"


@SHAPES
async def test_a_request_without_a_body_has_a_destination_too(tmp_path: Path, shape: str) -> None:
    async with (
        two(tmp_path, shape) as (running, addresses),
        running.client.get(f"{running.url}/v1/models") as response,
    ):
        assert (response.status, (await response.json())["name"] in addresses) == (200, True)


def members(directory: Path, *addresses: str) -> Any:
    """A pool of these members, by a file."""
    (directory / "next.json").write_text(json.dumps(addresses))
    (directory / "next.json").rename(directory / "members.json")
    return {"models": ["sim"], "engine": "none", "discovery": {"file": {"path": "members.json"}}}


# --- refusals ---------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_nobody_ready_is_503(tmp_path: Path, shape: str, method: str) -> None:
    """With an error of OpenAI's shape and the time to come again; llm-d answers a GET with 500 then."""
    async with gateway(tmp_path, shape, members(tmp_path), ready=False) as running:
        path, body = ("/v1/chat/completions", chat()) if method == "POST" else ("/v1/models", None)
        async with running.client.request(method, f"{running.url}{path}", json=body) as response:
            assert (response.status, response.content_type) == (503, "application/json")
            assert int(response.headers["retry-after"]) >= 1
            assert (await response.json())["error"]["code"] == 503


async def test_what_is_to_be_dropped_is_429(tmp_path: Path) -> None:
    tenants = {"unknown": "anonymous", "tiers": {"free": {"requests_per_minute": 1}}, "anonymous_tier": "free"}
    async with two(tmp_path, ORIGINAL_DST, tenants=tenants) as (running, _):
        await asked(running)
        async with running.post() as response:
            assert (response.status, response.content_type) == (429, "application/json")
            assert int(response.headers["retry-after"]) >= 1


async def test_a_body_that_is_wrong_is_400_and_nothing_is_sent(tmp_path: Path) -> None:
    async with two(tmp_path, ORIGINAL_DST) as (running, _), running.post(b'{"messages": [') as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, 400)


# --- the subset hint --------------------------------------------------------------------------------------------------


def as_list(*items: str) -> dict[str, str]:
    value = Value(list_value=ListValue(values=[Value(string_value=item) for item in items])).SerializeToString()
    return {SUBSET_LIST_HEADER: base64.b64encode(value).decode()}


def as_text(*items: str) -> dict[str, str]:
    return {SUBSET_HEADER: ", ".join(items)}


@pytest.mark.parametrize("hint", [as_list, as_text])
async def test_a_subset_is_obeyed(tmp_path: Path, hint: Any) -> None:
    async with two(tmp_path, OVERRIDE_HOST) as (running, addresses):
        for name in ("a", "b", "a", "b"):
            assert (await asked(running, headers=hint(addresses[name])))["name"] == name
            assert (await asked(running, headers=hint("10.9.9.9:80", addresses[name])))["name"] == name
        assert (await asked(running, headers=hint("127.0.0.1")))["name"] in addresses, "an address without a port"


@pytest.mark.parametrize(
    "hint", [as_list(), as_list("10.9.9.9:80"), as_text("10.9.9.9:80")], ids=["empty", "of others", "of others, text"]
)
async def test_a_subset_of_nobody_is_503(tmp_path: Path, hint: dict[str, str]) -> None:
    async with two(tmp_path, OVERRIDE_HOST) as (running, _), running.post(headers=hint) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, 503)


# --- time -------------------------------------------------------------------------------------------------------------


async def test_a_request_may_be_held_longer_than_a_gateway_waits_for_one_message(tmp_path: Path) -> None:
    """Without `max_message_timeout` in the filter no more time can be asked for; while bodies are streamed none is measured."""
    pool = {**members(tmp_path), "scaling": {"min_replicas": 0}}  # which has requests wait for the first replica
    async with (
        Backend(echo("a")) as a,
        gateway(tmp_path, ORIGINAL_DST, pool, ready=False, timeout="0.2s") as running,
    ):
        answer = asyncio.ensure_future(asked(running))
        await until(lambda: running.app.router.holding == 1)
        await asyncio.sleep(1.0)  # five times what the gateway would wait
        members(tmp_path, a.address)
        assert (await answer)["name"] == "a"
        assert {*(await running.envoy.stats("message_timeouts")).values()} == {0}


# --- the response -----------------------------------------------------------------------------------------------------


@SHAPES
async def test_a_stream_of_tokens_goes_through_untouched(tmp_path: Path, shape: str) -> None:
    async with (
        replica() as a,
        replica() as b,
        gateway(tmp_path, shape, {"replicas": [a.address, b.address]}) as running,
    ):
        for _ in range(4):
            async with running.post(chat(stream=True, max_tokens=16)) as response:
                text = await response.text()
                assert (response.status, text.endswith("data: [DONE]\n\n")) == (200, True)
                assert '"choices":[]' not in text, "the usage that only we asked for"


async def test_the_next_of_a_list_is_no_way_out_where_the_header_is_an_address(tmp_path: Path) -> None:
    """Why `envoy.endpoints` is 1 there: a list is no address, and Envoy 1.40 answers 503 by itself."""
    async with (
        two(tmp_path, ORIGINAL_DST, envoy={"endpoints": 2}) as (running, _),
        running.post() as response,
    ):
        assert (response.status, response.content_type) == (503, "text/plain")


async def test_the_list_is_read_where_the_gateway_has_members(tmp_path: Path) -> None:
    """Without retries the first of it counts."""
    async with two(tmp_path, OVERRIDE_HOST, envoy={"endpoints": 2}) as (running, addresses):
        seen = await asked(running)
        best, next_best = running.last().decision.endpoints[:2]
        assert addresses[seen["name"]] == best
        assert values(seen, names.DESTINATION) == [f"{best},{next_best}"]


async def test_a_gateway_that_fails_closed_does_so(tmp_path: Path) -> None:
    async with two(tmp_path, ORIGINAL_DST) as (running, _):
        await asked(running)
        await running.settled()
        await running.app.stop(grace_s=0.1)
        async with running.post() as response:
            assert response.status in (500, 503, 504)


async def test_a_client_cannot_choose_the_destination_when_the_decision_fails(tmp_path: Path) -> None:
    """The request passes, and has nowhere to go."""
    async with two(tmp_path, ORIGINAL_DST) as (running, _), Backend(echo("elsewhere")) as elsewhere:
        running.app.router.arrive = broken  # type: ignore[method-assign, assignment]
        async with running.post(headers={names.DESTINATION: elsewhere.address}) as response:
            assert response.status == 503
        assert elsewhere.received == []


def broken(*_: Any) -> Any:
    raise RuntimeError("a mistake of ours")


@SHAPES
@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_the_response_is_the_end_of_the_flight_with_its_usage(
    tmp_path: Path, shape: str, stream: bool
) -> None:
    async with (
        replica() as a,
        gateway(tmp_path, shape, {"replicas": [a.address]}) as running,
    ):
        async with running.post(chat(stream=stream, max_tokens=2)) as response:
            assert response.status == 200
            await response.read()
        ended = (await running.ended()).ended
        assert ended is not None
        outcome = ended.outcome
        assert (outcome.end, outcome.status) == ("ok", 200)
        assert outcome.usage is not None
        assert (outcome.usage.completion_tokens, ended.output_tokens) == (2, 2)
        assert outcome.ttft_s is not None
        assert outcome.duration_s is not None
        assert outcome.duration_s >= outcome.ttft_s


async def test_an_answer_that_takes_longer_than_a_flight_may_be_silent_is_not_lost(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def late(_: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.json_response({"usage": {"prompt_tokens": 3, "completion_tokens": 2}})

    async with Backend(late) as a:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address]}
        async with gateway(tmp_path, ORIGINAL_DST, pool, requests={"flight_ttl_s": 3}) as running:
            answer = asyncio.ensure_future(asked(running))
            await until(lambda: len(running.app.router.ledger) == 1)
            (flight,) = running.app.router.ledger
            routed_at = flight.routed_at
            await until(lambda: flight.expires_at > routed_at + 3)
            go.set()
            await answer
            ended = (await running.ended()).ended
            assert ended is not None
            assert (ended.outcome.end, ended.outcome.usage) == ("ok", Usage(3, 2))


async def test_a_client_that_leaves_ends_its_flight(tmp_path: Path) -> None:
    async with (
        replica() as a,
        gateway(tmp_path, ORIGINAL_DST, {"replicas": [a.address]}) as running,
    ):
        async with running.post(chat(stream=True, max_tokens=2000)) as response:
            await response.content.readany()
            response.close()
        ended = (await running.ended()).ended
        assert ended is not None
        assert ended.outcome.end == "client_gone"


async def test_a_replica_that_breaks_off_ends_the_flight(tmp_path: Path) -> None:
    async def breaks(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with Backend(breaks) as a:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address]}
        async with gateway(tmp_path, ORIGINAL_DST, pool) as running:
            async with running.post() as response:
                assert response.status == 503
            ended = (await running.ended()).ended
            assert ended is not None
            assert (ended.outcome.end, ended.outcome.status) == ("upstream_error", 503)
