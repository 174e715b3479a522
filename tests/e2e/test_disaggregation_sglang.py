"""Prefill and decode apart without a side-car, through a real Envoy: it sends the same request to two engines of SGLang's."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from extproc.core.types import End
from extproc.envoy import names
from tests.e2e.stack import Stack, all_ready, chat, stack
from tests.support.backend import Backend, Received, stream
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]
FIELDS = {"bootstrap_host", "bootstrap_port", "bootstrap_room"}
OF_PROXY = {names.MIRROR_HEADER, names.COPY_HEADER, names.RETRIES_HEADER}
PORTS = (9_001, 8_999)
"""Of the bootstrap servers: the first by a label, the other by the setting of the pool."""


async def answer(name: str, request: web.Request) -> web.StreamResponse:
    """The name, streamed where that is asked for."""
    if json.loads(await request.read()).get("stream"):
        text = json.dumps({"choices": [{"delta": {"content": name}}]}).encode()
        return await stream(request, (b"data: " + text + b"\n\n", b"data: [DONE]\n\n"))
    return web.json_response({"choices": [{"message": {"content": name}}]})


@dataclass
class Scene:
    """Two engines that prefill, two that decode, and one that does both."""

    running: Stack
    prefill: tuple[Backend, Backend]
    decode: tuple[Backend, Backend]
    both: Backend
    fails: list[int]
    """What those that prefill answer instead."""

    async def ask(self, body: Any, **options: Any) -> tuple[int, bytes]:
        """Status and body of an answer. What replicas received before is forgotten."""
        for backend in (*self.prefill, *self.decode, self.both):
            backend.received.clear()
        async with self.running.post(body, **options) as response:
            return response.status, await response.read()

    async def copy(self) -> Received:
        """What the one that prefills got of a request. It alone, and nothing else."""
        prefiller = self.running.last().decision.prefiller
        (at,) = [backend for backend in self.prefill if backend.address == prefiller]
        (other,) = [backend for backend in self.prefill if backend is not at]
        await until(lambda: bool(at.received))
        assert (len(at.received), other.received, self.both.received) == (1, [], [])
        assert json.loads(at.received[0].body)["bootstrap_port"] == PORTS[self.prefill.index(at)]
        assert OF_PROXY & at.received[0].headers.keys() == {names.COPY_HEADER}
        return at.received[0]

    def decoded(self) -> Received:
        """What the one that decodes got."""
        (received,) = [each for backend in self.decode for each in backend.received]
        assert not OF_PROXY & received.headers.keys()
        return received


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    fails: list[int] = []

    async def prefill(request: web.Request) -> web.StreamResponse:
        return web.Response(status=fails[0]) if fails else await answer("prefill", request)

    async with AsyncExitStack() as exits:
        one, two = [await exits.enter_async_context(Backend(prefill)) for _ in range(2)]
        three, four, both = [
            await exits.enter_async_context(Backend(lambda request, n=name: answer(n, request)))  # type: ignore[misc]
            for name in ("decode", "decode", "both")
        ]
        pool = {
            "engine": "none",
            "models": ["sim"],
            "health": {"interval_s": 60, "doubt_interval_s": 60},
            "disaggregation": {"protocol": "sglang", "local_prefill": False, "bootstrap_port": PORTS[1]},
            "replicas": [
                {"address": one.address, "labels": {"role": "prefill", "bootstrap_port": PORTS[0]}},
                {"address": two.address, "labels": {"role": "prefill"}},
                {"address": three.address, "labels": {"role": "decode"}},
                {"address": four.address, "labels": {"role": "decode"}},
                both.address,
            ],
        }
        async with stack(tmp_path_factory.mktemp("stack"), pool, ready=False) as running:
            await until(lambda: all_ready(running.app))
            yield Scene(running, (one, two), (three, four), both, fails)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("refuses", [False, True], ids=["", "prefill fails"])
async def test_both_get_the_same_request_and_the_client_one_answer(scene: Scene, streams: bool, refuses: bool) -> None:
    scene.fails.extend([500] * refuses)
    asked = chat("Hello " * 50, stream=streams)
    status, text = await scene.ask(asked)
    copy, decoded = await scene.copy(), scene.decoded()
    scene.fails.clear()
    assert status == 200
    assert b"decode" in text
    assert b"prefill" not in text
    assert (copy.method, copy.path, copy.body) == (decoded.method, decoded.path, decoded.body)
    body = json.loads(decoded.body)
    assert body["bootstrap_host"] == "127.0.0.1"
    assert 0 < body["bootstrap_room"] < 2**63
    assert {key: value for key, value in body.items() if key not in FIELDS | {"stream_options"}} == asked
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.OK
    assert record.ended.outcome.served == record.decision.endpoints[0]
    await scene.running.settled()
    assert not any(member.load.requests for _, member in scene.running.app.router.members())


async def test_each_request_has_a_room_of_its_own(scene: Scene) -> None:
    rooms = set()
    for _ in range(5):
        await scene.ask(chat("Hello"))
        rooms.add(json.loads(scene.decoded().body)["bootstrap_room"])
    assert len(rooms) == 5


async def test_what_cannot_be_split_goes_whole_to_one_that_does_both(scene: Scene) -> None:
    forged = dict.fromkeys((*OF_PROXY, *names.PREFILLER_HEADERS), scene.prefill[0].address)
    status, text = await scene.ask(chat("Hello", n=2), headers=forged)
    assert status == 200
    assert b"both" in text
    (received,) = scene.both.received
    assert not FIELDS & json.loads(received.body).keys()
    assert not (OF_PROXY | set(names.PREFILLER_HEADERS)) & received.headers.keys()
    # A copy leaves with its request: were there one, it would be here with that of the next.
    async with scene.running.post(chat("Hello")) as response:
        await response.read()
    await until(lambda: any(backend.received for backend in scene.prefill))
    assert sum(len(backend.received) for backend in scene.prefill) == 1
    await scene.running.settled()


async def test_a_client_says_nothing_of_where_its_prompt_is_computed(scene: Scene) -> None:
    status, _ = await scene.ask(chat("Hello"), headers=dict.fromkeys(OF_PROXY, scene.both.address))
    assert status == 200
    await scene.copy()
    scene.decoded()
    status, text = await scene.ask({**chat("Hello"), "bootstrap_host": "10.1.2.3"})
    assert (status, b"bootstrap_host" in text) == (400, True)
    await scene.running.settled()


async def test_only_those_that_decode_are_tried_again(scene: Scene) -> None:
    """The last of this module: who decodes goes, one after the other, sooner than extproc hears of it."""
    asked = chat("Again " * 50)
    await scene.ask(asked)
    first = scene.running.last().decision.endpoints[0]
    (gone,) = [backend for backend in scene.decode if backend.address == first]
    await scene.running.settled()
    await gone.__aexit__(None, None, None)
    status, _ = await scene.ask(asked)
    assert scene.running.last().decision.endpoints[0] == first
    assert status == 200
    assert (await scene.copy()).body == scene.decoded().body
    (left,) = [backend for backend in scene.decode if backend is not gone]
    await left.__aexit__(None, None, None)
    before = scene.running.last()
    status, _ = await scene.ask(asked)
    record = scene.running.last()
    assert record is not before
    assert left.address in record.decision.endpoints
    assert status == 503
    await scene.copy()
    await scene.running.settled()
