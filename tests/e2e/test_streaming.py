"""Responses pass through untouched and undelayed, and what they say of tokens and time still arrives."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from extproc.core.types import End
from extproc.sim.backend import Backend as Replica
from tests.e2e.stack import CHAT, Json, Stack, chat, replica, stack
from tests.support.backend import Backend, Handler
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

STREAM = {"content-type": "text/event-stream; charset=utf-8"}


class Scripted:
    """A replica whose answer each test sets."""

    def __init__(self) -> None:
        self.answer: Handler = self._unset
        self.backend = Backend(self._now)

    async def _now(self, request: web.Request) -> web.StreamResponse:
        return await self.answer(request)

    async def _unset(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPNotImplemented


@dataclass
class Scene:
    running: Stack
    simulated: Replica
    scripted: Scripted


def scripted_chat(**more: object) -> Json:
    return chat(**{"stream": True, **more}) | {"model": "scripted"}  # type: ignore[arg-type]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as exits:
        simulated = await exits.enter_async_context(replica())
        scripted = Scripted()
        await exits.enter_async_context(scripted.backend)
        pools: list[Json] = [
            {"name": "simulated", "models": ["sim"], "replicas": [simulated.address]},
            {"name": "scripted", "models": ["scripted"], "engine": "none", "replicas": [scripted.backend.address]},
        ]
        async with stack(tmp_path_factory.mktemp("stack"), *pools) as running:
            yield Scene(running, simulated, scripted)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(scene: Scene) -> AsyncIterator[None]:
    await scene.running.seen()
    yield
    await scene.running.settled()


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def test_a_chunk_reaches_the_client_before_the_next_is_made(scene: Scene) -> None:
    received = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        for n in range(5):
            await response.write(event({"n": n}))
            await (
                received.wait()
            )  # the test sets it with the chunk in hand: a chunk held back would block both for ever
            received.clear()
        return response

    scene.scripted.answer = answer
    got = []
    async with asyncio.timeout(20), scene.running.post(scripted_chat()) as response:
        while chunk := await response.content.readany():
            got.append(chunk)
            received.set()
    assert got == [event({"n": n}) for n in range(5)]


@pytest.mark.parametrize(
    "body",
    [
        chat("Say it.", stream=True, max_tokens=12),
        chat("Say it.", stream=True, max_tokens=12, stream_options={"include_usage": True}),
        chat("Say it.", stream=True, max_tokens=12, stream_options={"include_usage": False}),
        chat("Say it.", stream=True, max_tokens=12, stream_options=None),
        chat("Say it.", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
        chat("Say it.", stream=False, max_tokens=12),
    ],
    ids=["plain", "with usage", "without usage", "null options", "continuous usage", "not streamed"],
)
async def test_the_client_sees_what_the_replica_alone_would_have_sent(scene: Scene, body: Json) -> None:
    headers = {"x-request-id": "r"}
    await scene.running.served(
        body
    )  # else the first of the two below prefills, and the other says that it hit the cache
    async with scene.running.client.post(
        f"http://{scene.simulated.address}{CHAT}", json=body, headers=headers
    ) as response:
        direct = await response.read()
    async with scene.running.post(body, headers=headers) as response:
        through = await response.read()
    assert timeless(through) == timeless(direct)
    asked = bool((body.get("stream_options") or {}).get("include_usage")) or not body["stream"]
    assert (b'"usage":{' in through) == asked
    record = await scene.running.ended()
    assert record.ended is not None
    usage = record.ended.outcome.usage
    assert usage is not None
    assert (usage.completion_tokens, bool(usage.prompt_tokens), usage.cached_tokens is not None) == (
        direct.count(b'"delta":{"content"') if body["stream"] else json.loads(direct)["usage"]["completion_tokens"],
        True,
        True,
    )


def timeless(body: bytes) -> bytes:
    """Without the second, and without the fingerprint: vLLM puts it into the last event, so it leaves with the usage event that we asked for."""
    return re.sub(rb',"system_fingerprint":"[^"]*"', b"", re.sub(rb'"created":\d+', b'"created":0', body))


async def test_the_record_of_a_stream_has_its_times_and_its_tokens(scene: Scene) -> None:
    async with scene.running.post(chat("Count. " * 200, stream=True, max_tokens=20, ignore_eos=True)) as response:
        whole = await response.read()
    record = await scene.running.ended()
    assert record.ended is not None
    outcome = record.ended.outcome
    assert (outcome.end, outcome.status, outcome.served) == (End.OK, 200, scene.simulated.address)
    assert outcome.ttft_s is not None
    assert outcome.replica_ttft_s is not None
    assert outcome.duration_s is not None
    assert 0 < outcome.replica_ttft_s <= outcome.ttft_s < outcome.duration_s
    assert record.ended.output_tokens == 20
    assert outcome.response_bytes is not None
    assert outcome.response_bytes >= len(
        whole
    )  # the usage chunk, which we asked for, is counted where it came in or not


async def test_usage_corrects_the_bytes_per_token(scene: Scene) -> None:
    """The scripted engine says that a token is 2 bytes; the prior says 4."""

    async def answer(request: web.Request) -> web.StreamResponse:
        prompt = json.loads(await request.read())["messages"][0]["content"]
        usage = {"prompt_tokens": len(prompt) // 2, "completion_tokens": 3, "prompt_tokens_details": None}
        return web.json_response({"object": "chat.completion", "choices": [], "usage": usage})

    scene.scripted.answer = answer
    learned = scene.running.app.router.pools["scripted"].prompt_tokens
    before = learned.bytes_per_token("scripted")
    estimates = []
    for i in range(6):
        await scene.running.served(scripted_chat(prompt=f"{i}" * 10_000, stream=False))
        estimates.append((await scene.running.ended()).decision.prompt_tokens)
    assert before == 4.0
    assert estimates[0] == pytest.approx(2_500, rel=0.02)
    assert estimates == sorted(estimates)
    assert estimates[-1] == pytest.approx(5_000, rel=0.05)
    assert learned.bytes_per_token("scripted") == pytest.approx(2.0, rel=0.05)


async def test_the_first_token_is_known_while_the_stream_still_runs(scene: Scene) -> None:
    proceed = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        await response.write(event({"n": 0}))
        await proceed.wait()
        await response.write(event({"n": 1}))
        return response

    scene.scripted.answer = answer
    async with scene.running.post(scripted_chat()) as response:
        record = scene.running.last()
        member = scene.running.app.router.pools["scripted"].fleet.members[0]
        [flight] = member.load
        await until(lambda: flight.first_token_at is not None)
        await until(lambda: flight.response_bytes >= len(event({"n": 0})))
        assert record.ended is None
        assert member.load.decoding(time.monotonic()) == 1
        proceed.set()
        await response.read()
    await scene.running.ended()


async def test_a_client_that_leaves_ends_its_flight(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        await response.write(event({"n": 0}))
        await asyncio.Event().wait()
        return response

    scene.scripted.answer = answer
    async with scene.running.post(scripted_chat()) as response:
        await response.content.readany()
        assert scene.running.app.router.in_flight == 1
        response.close()
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.CLIENT_GONE
    assert scene.running.metric(
        "extproc_outcomes_total", pool="scripted", replica=scene.scripted.backend.address, outcome="client_gone"
    )


async def test_a_client_that_leaves_before_its_answer_ends_its_flight(scene: Scene) -> None:
    scene.simulated.hang = True
    sent = asyncio.create_task(scene.running.served(chat("hello", stream=False)))
    await until(lambda: scene.simulated.in_flight == 1)
    sent.cancel()
    await asyncio.gather(sent, return_exceptions=True)
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.CLIENT_GONE
    await until(lambda: scene.simulated.in_flight == 0)  # and the replica stops to work for it
    scene.simulated.hang = False


@pytest.mark.parametrize(
    ("status", "end"), [(500, End.UPSTREAM_ERROR), (503, End.UPSTREAM_ERROR), (429, End.CLIENT_ERROR)]
)
async def test_an_error_of_the_replica_reaches_client_and_record(scene: Scene, status: int, end: End) -> None:
    error = {"error": {"message": "no", "type": "t", "param": None, "code": status}}

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(error, status=status)

    scene.scripted.answer = answer
    async with scene.running.post(scripted_chat()) as response:
        assert (response.status, await response.json()) == (status, error)
    record = await scene.running.ended()
    assert record.ended is not None
    assert (record.ended.outcome.end, record.ended.outcome.status) == (end, status)


async def test_a_stream_that_the_replica_breaks_off_breaks_for_the_client_too(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        await response.write(event({"n": 0}))
        assert request.transport is not None
        request.transport.abort()
        return response

    scene.scripted.answer = answer
    with pytest.raises(aiohttp.ClientError):
        async with scene.running.post(scripted_chat()) as response:
            await response.read()
    record = await scene.running.ended()
    assert record.ended is not None
    assert (record.ended.outcome.end, record.ended.outcome.status) == (End.UPSTREAM_ERROR, 200)
