"""Prefill and decode apart, through a real Envoy: who computes the prompt is said by header, and by us alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from extproc.core.types import End
from extproc.envoy import bootstrap, endpoints, names
from tests.e2e.stack import Stack, all_ready, chat, configured, stack
from tests.support.backend import Backend, stream
from tests.support.pd_sidecar import ASKED, sidecar
from tests.support.pd_sidecar import HEADER as SIDECAR_READS
from tests.support.waiting import until

pytestmark = pytest.mark.envoy
HELD = {"do_remote_prefill": True, "remote_engine_id": "e1", "remote_block_ids": [1, 2]}
PIECES = (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b"data: [DONE]\n\n")


@dataclass
class Scene:
    """One replica that prefills, one that decodes behind a side-car, and what the latter got."""

    running: Stack
    prefill: Backend
    decode: Backend
    decoded: list[dict[str, Any]] = field(default_factory=list)
    fails: list[int] = field(default_factory=list)
    """What the replica that prefills answers instead."""

    async def ask(self, **options: Any) -> int:
        async with self.running.post(chat("Hello " * 50, stream=True), **options) as response:
            await response.read()
            status: int = response.status
            return status


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True], ids=["forced", "free"])
async def scene(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    decoded: list[dict[str, Any]] = []
    fails: list[int] = []

    async def prefill(_: web.Request) -> web.StreamResponse:
        return web.Response(status=fails[0]) if fails else web.json_response({"kv_transfer_params": HELD})

    async def decode(asked: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        decoded.append(body)
        return await stream(asked, PIECES)

    async with AsyncExitStack() as exits:
        one = await exits.enter_async_context(Backend(prefill))
        other = await exits.enter_async_context(Backend(sidecar(decode)))
        pool = {
            "engine": "none",
            "models": ["sim"],
            "disaggregation": {"local_prefill": request.param},
            "replicas": [
                {"address": one.address, "labels": {"role": "prefill"}},
                {"address": other.address, "labels": {"role": "decode"}},
            ],
        }
        async with stack(tmp_path_factory.mktemp("stack"), pool, ready=False) as running:
            await until(lambda: all_ready(running.app))
            yield Scene(running, one, other, decoded, fails)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_is_split_where_it_must_be_and_whole_where_nothing_else_runs(scene: Scene) -> None:
    forced = not scene.running.config.pools[0].disaggregation.local_prefill  # type: ignore[union-attr]
    before = len(scene.prefill.received)
    assert await scene.ask() == 200
    record = await scene.running.ended()
    assert record.decision.endpoints == (scene.decode.address,)
    assert record.decision.prefiller == (scene.prefill.address if forced else None)
    assert scene.decode.received[-1].headers.get(SIDECAR_READS) == record.decision.prefiller
    assert len(scene.prefill.received) - before == forced
    if forced:
        prompt = json.loads(scene.prefill.received[-1].body)
        assert (prompt["max_tokens"], prompt["stream"], prompt["kv_transfer_params"]) == (1, False, ASKED)
    assert scene.decoded[-1].get("kv_transfer_params") == (HELD if forced else None)
    await scene.running.settled()
    assert not any(member.load.requests for _, member in scene.running.app.router.members())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_client_cannot_name_who_computes_its_prompt(scene: Scene) -> None:
    await scene.ask(headers=dict.fromkeys(names.SIDECAR_HEADERS, "10.1.2.3:80"))
    decided = scene.running.last().decision.prefiller
    got = scene.decode.received[-1].headers
    assert {got.get(name) for name in names.PREFILLER_HEADERS} == {decided}
    assert "10.1.2.3:80" not in got.values()
    body = {**chat("Hello"), "kv_transfer_params": {"remote_host": "10.1.2.3"}}
    async with scene.running.post(body) as response:
        assert response.status == 400
        assert "kv_transfer_params" in (await response.json())["error"]["message"]
    await scene.running.settled()


@pytest.mark.asyncio(loop_scope="module")
async def test_an_error_of_who_computes_it_ends_the_flight_and_its_leg(scene: Scene) -> None:
    if scene.running.config.pools[0].disaggregation.local_prefill:  # type: ignore[union-attr]
        return
    scene.fails.append(500)
    assert await scene.ask() == 500
    scene.fails.clear()
    record = await scene.running.ended()
    assert record.ended is not None
    assert record.ended.outcome.end is End.UPSTREAM_ERROR
    await scene.running.settled()
    assert not any(member.load.requests for _, member in scene.running.app.router.members())


@pytest.mark.parametrize("tenants", [None, {"unknown": "anonymous"}], ids=["", "tenants"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("apart", [{}, {"protocol": "sglang", "local_prefill": False}], ids=["llm-d", "sglang"])
def test_envoy_takes_the_rules_with_some_headers_more(tmp_path: Path, tenants: Any, ranks: int, apart: Any) -> None:
    """Its limit for the size of their expression is what the names are cut down for."""
    named: list[dict[str, Any]] = [
        {"name": "a", "models": ["a"], "replicas": ["10.0.0.1:8000"], "disaggregation": apart},
        {"name": "b", "models": ["b"], "replicas": ["10.0.0.2:8000"], "data_parallel": ranks},
    ]
    config = configured(tmp_path, *named, **({"tenants": tenants} if tenants else {}))
    endpoints.create_if_missing(config)
    bootstrap.validate(bootstrap.write(config))
