"""Other ways to be connected: unix sockets, the streaming mode of endpoint picker gateways, paths kept from extproc."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from extproc.envoy import names
from tests.e2e.stack import Json, chat, replica, stack
from tests.support.backend import Backend

pytestmark = pytest.mark.envoy


async def test_unix_sockets_for_grpc_and_http(tmp_path: Path) -> None:
    sockets = {"grpc": f"unix:{tmp_path}/grpc.sock", "http": f"unix:{tmp_path}/http.sock"}
    async with replica() as a, stack(tmp_path, {"replicas": [a.address]}, listen=sockets) as running:
        assert await running.served() == a.address
        assert (await running.ended()).decision.endpoints == (a.address,)
        connector = aiohttp.UnixConnector(f"{tmp_path}/http.sock")
        async with aiohttp.ClientSession(connector=connector) as http, http.get("http://extproc/readyz") as response:
            assert (response.status, await response.text()) == (200, "ok\n")


def full_duplex(rendered: Json) -> None:
    """What gateways with an endpoint picker set; nothing else of the bootstrap changes."""
    manager = rendered["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    [ours] = [f["typed_config"] for f in manager["http_filters"] if f["name"] == "envoy.filters.http.ext_proc"]
    ours["processing_mode"] |= {"request_body_mode": "FULL_DUPLEX_STREAMED", "request_trailer_mode": "SEND"}


@pytest.mark.parametrize("size", [1_000, 200_000, 3_000_000])
async def test_full_duplex_routes_and_gives_the_body_back_whole(tmp_path: Path, size: int) -> None:
    async def digest(request: web.Request) -> web.StreamResponse:
        return web.json_response({"sha256": hashlib.sha256(await request.read()).hexdigest()})

    body = json.dumps(chat("word " * (size // 5))).encode()
    async with Backend(digest) as a, Backend(digest) as b:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address, b.address]}
        async with stack(tmp_path, pool, change=full_duplex) as running:
            for _ in range(3):
                async with running.post(body) as response:
                    assert response.status == 200, await response.text()
                    served = response.headers[names.REPLICA_HEADER]
                    assert (await response.json())["sha256"] == hashlib.sha256(body).hexdigest()
                record = await running.ended()
                assert record.decision.endpoints[0] == served
                assert record.decision.prompt_tokens > size / 8


async def test_full_duplex_does_not_ask_for_usage_where_nobody_says_that_it_is_read(tmp_path: Path) -> None:
    async with replica() as a, stack(tmp_path, {"replicas": [a.address]}, change=full_duplex) as running:
        async with running.post(chat("Hello", stream=True)) as response:
            assert (response.status, b'"usage"' in await response.read()) == (200, False)
        record = await running.ended()
        assert record.ended is not None
        assert record.ended.outcome.usage is None
        async with running.post({**chat(), "model": "nope"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, 404)


async def test_disabled_paths_do_not_touch_extproc(tmp_path: Path) -> None:
    async with Backend() as a:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address]}
        envoy = {"disabled_paths": ["/health", "/mine"]}
        async with stack(tmp_path, pool, envoy=envoy) as running:
            await running.served()
            before = running.app.registry.get_sample_value("extproc_streams_total", {"kind": "opened"})
            assert before == 1
            for path in ("/health", "/mine/own", "/health?deep=1"):
                async with running.client.get(f"{running.url}{path}") as response:
                    assert await response.text() == a.address
            assert running.app.registry.get_sample_value("extproc_streams_total", {"kind": "opened"}) == 1
            async with running.client.get(f"{running.url}/other") as response:
                assert await response.text() == a.address
            assert running.app.registry.get_sample_value("extproc_streams_total", {"kind": "opened"}) == 2
