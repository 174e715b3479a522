"""What the rendered bootstrap does, seen with the real Envoy."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from extproc.envoy import names
from tests.envoy import steering
from tests.envoy.steering import PICK
from tests.support.backend import Backend
from tests.support.envoy import EnvoyProcess
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


def url(config: Any, path: str = "/v1/chat/completions") -> str:
    return f"http://{config.envoy.listen}{path}"


def entries(config: Any) -> list[dict[str, Any]]:
    text = config.envoy.access_log.read_text() if config.envoy.access_log.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


async def test_a_pick_is_followed_and_named_in_the_response(tmp_path: Path) -> None:
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, a.address, b.address, response_headers=True)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            for picked in (a, b) * 4:
                async with client.post(url(config), headers={PICK: picked.address}) as response:
                    assert await response.text() == picked.address
                    assert response.headers[names.REPLICA_HEADER] == picked.address


async def test_headers_for_extproc_never_reach_the_replica(tmp_path: Path) -> None:
    private = {"x-session-id": "s", "x-request-priority": "1", "x-chat": "c", "x_session_id": "u"}
    control = dict.fromkeys(names.CONTROL_HEADERS, "spoofed")
    tuning = {"x-envoy-max-retries": "9", "x-envoy-upstream-rq-timeout-ms": "1"}
    passed = {"authorization": "Bearer k", "cookie": "c", "x-tenant": "t"}
    async with Backend() as a:
        requests = {"session_header": "X-Chat", "tenant_header": "x-tenant"}
        config = steering.config(tmp_path, a.address, requests=requests)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            for path in ("/v1/chat/completions", "/health"):
                async with client.post(url(config, path), headers={**private, **control, **tuning, **passed}) as r:
                    assert r.status == 200
    for received in a.received:
        assert not {*private, *control, *tuning} & set(received.headers)
        assert passed.items() <= received.headers.items()
    assert len(a.received) == 2


async def test_a_refused_connection_goes_to_the_next_of_the_list(tmp_path: Path) -> None:
    async with Backend() as a, Backend() as b:
        config = steering.config(tmp_path, "127.0.0.1:1", a.address, b.address)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            for _ in range(5):
                async with client.post(url(config), headers={PICK: f"127.0.0.1:1,{b.address}"}) as response:
                    assert (response.status, await response.text()) == (200, b.address)
            await until(lambda: len(entries(config)) == 5)
    assert [(e["attempts"], e["replica"]) for e in entries(config)] == [(2, b.address)] * 5


async def test_replica_ttft_counts_from_the_last_attempt(tmp_path: Path) -> None:
    async def refuse_late(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.4)
        return web.Response(status=503)

    async def first_token_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)  # headers at once, as vLLM does
        await asyncio.sleep(0.2)
        await response.write(b"data: [DONE]\n\n")
        return response

    async with Backend(refuse_late) as a, Backend(first_token_late) as b:
        config = steering.config(tmp_path, a.address, b.address)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            async with client.post(url(config), headers={PICK: f"{a.address},{b.address}"}) as response:
                await response.read()
            [entry] = await until(lambda: entries(config))
    assert entry["attempts"] == 2
    assert 0.6e6 <= entry["ttft_us"] <= 1.5e6
    assert 0.2e6 <= entry["replica_ttft_us"] <= 0.39e6


@pytest.mark.parametrize("size", [100, 3_000_000], ids=["small", "larger than a connection's buffer"])
async def test_usage_of_a_json_response_is_read_and_the_response_unchanged(tmp_path: Path, size: int) -> None:
    usage = {"prompt_tokens": 14, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4}}
    body = json.dumps({"data": "x" * size, "usage": usage}).encode()

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json", charset="utf-8")

    async with Backend(answer) as a:
        config = steering.config(tmp_path, a.address)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            async with client.post(url(config, "/v1/embeddings")) as response:
                assert (response.status, await response.read() == body) == (200, True)
            [entry] = await until(lambda: entries(config))
    assert (entry["prompt_tokens"], entry["completion_tokens"], entry["cached_tokens"]) == (14, 8, 4)


async def test_a_websocket_opens_only_on_paths_without_extproc(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    async with Backend(echo) as a:
        config = steering.config(tmp_path, a.address)
        async with EnvoyProcess(steering.steered(config)), aiohttp.ClientSession() as client:
            async with client.ws_connect(url(config, "/v1/realtime?model=m")) as socket:
                await socket.send_str("hello")
                assert (await socket.receive(timeout=5)).data == "hello"
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await client.ws_connect(url(config, "/v1/chat/completions"))
    assert refused.value.status == 403
