"""A pool of different engines behind one process, over real sockets: each is found out, checked where it answers, and used."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from extproc.app import App
from extproc.config import Config
from extproc.core.health.states import State
from extproc.core.scaling.autoscaler import Autoscaler
from extproc.core.types import Route
from tests.adapters.engines.pages import documented, recorded
from tests.core.support import request, text
from tests.e2e.stack import configured
from tests.support.ports import free_port
from tests.support.waiting import until

LIST = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
FORMS: dict[str, dict[str, bytes]] = {
    "vllm": {"/metrics": recorded("metrics_idle_fresh.txt"), "/health": b"", "/v1/models": LIST},
    "sglang": {"/metrics": documented("sglang_0.5.txt"), "/health": b"", "/v1/models": LIST},
    "tgi": {"/metrics": documented("tgi_3.txt"), "/health": b"", "/v1/models": LIST},
    "trtllm": {
        "/metrics": documented("trtllm_iterations.json"),
        "/prometheus/metrics": documented("trtllm_1.2.txt"),
        "/health": b"",
        "/v1/models": LIST,
    },
    "triton_trtllm": {"/metrics": documented("triton_trtllm.txt"), "/health/ready": b"", "/v1/models": LIST},
    "triton": {"/metrics": documented("triton.txt"), "/v2/health/live": b"", "/v2/health/ready": b""},
    "ray": {"/metrics": documented("ray_node_a.txt"), "/-/healthz": b"success", "/v1/models": LIST},
    "unknown": {"/health": b"", "/v1/models": LIST},
}
"""What each engine answers with 200; 404 on everything else. The last is SGLang without --enable-metrics."""


@asynccontextmanager
async def answering(pages: dict[str, bytes]) -> AsyncIterator[str]:
    """A server with just these pages; its address."""

    async def answer(asked: web.Request) -> web.Response:
        page = pages.get(asked.path)
        return web.Response(status=404) if page is None else web.Response(body=page)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    address = f"127.0.0.1:{free_port()}"
    await web.TCPSite(runner, "127.0.0.1", int(address.rpartition(":")[2])).start()
    try:
        yield address
    finally:
        await runner.cleanup()


@pytest.fixture
async def engines() -> AsyncIterator[dict[str, str]]:
    """Name of an engine -> address of one."""
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(answering(pages)) for name, pages in FORMS.items()}


async def page(app: App) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"http://{app.config.listen.http}/metrics") as response:
        return await response.text()


async def test_a_mixed_pool_is_found_out_checked_and_used(tmp_path: Path, engines: dict[str, str]) -> None:
    pool = {
        "replicas": list(engines.values()),
        "scrape": {"interval_s": 0.05, "idle_interval_s": 0.2},
        "health": {"interval_s": 0.2, "doubt_interval_s": 0.05},
    }
    app = App(configured(tmp_path, pool))
    await app.start()
    try:
        known = app.router.pools["default"].fleet
        await until(lambda: all(m.state(app._clock()) is State.READY for m in known.members))
        addresses = {address: name for name, address in engines.items()}
        await until(lambda: all((m.engine or "unknown") == addresses[m.address] for m in known.members))
        told = await page(app)
        for name, address in engines.items():
            assert f'extproc_replica_engine{{engine="{name}",pool="default",replica="{address}"}} 1.0' in told
            assert (f'extproc_replica_running{{pool="default",replica="{address}"}}' in told) is (
                name not in ("unknown", "triton")
            )
        routes = [app.router.arrive(request(text(2000, n)), app._clock()) for n in range(40)]
        assert {r.endpoints[0] for r in routes if isinstance(r, Route)} >= {engines["unknown"], engines["vllm"]}
    finally:
        await app.stop(grace_s=0)


async def test_the_gpus_of_each_replica_are_read_beside_its_engine(tmp_path: Path, engines: dict[str, str]) -> None:
    async with answering({"/metrics": documented("dcgm_4.txt")}) as exporter:
        pool = {
            "policy": "gpu_utilization",
            "replicas": [
                {"address": engines["vllm"], "labels": {"gpu_index": "0"}},
                {"address": engines["sglang"], "labels": {"gpu_uuid": "GPU-cccc"}},
            ],
            "gpu": {"url": f"http://{{host}}:{exporter.rpartition(':')[2]}/metrics", "interval_s": 0.05},
        }
        app = App(configured(tmp_path, pool))
        await app.start()
        try:
            fleet = app.router.pools["default"].fleet
            await until(lambda: all(m.gpu_use(app._clock()) is not None for m in fleet.members))
            told = await page(app)
            for name, use, memory in (("vllm", 0.9, 0.75), ("sglang", 0.1, 0.5)):
                replica = f'pool="default",replica="{engines[name]}"'
                assert f"extproc_replica_gpu_use_ratio{{{replica}}} {use}" in told
                assert f"extproc_replica_gpu_memory_ratio{{{replica}}} {memory}" in told
            await until(lambda: all(m.state(app._clock()) is State.READY for m in fleet.members))
            route = app.router.arrive(request(text(2000)), app._clock())
            assert isinstance(route, Route)
            assert route.endpoints[0] == engines["sglang"]
        finally:
            await app.stop(grace_s=0)


def uses(scaling: Autoscaler, gpu: float) -> bool:
    return scaling.gpu == gpu


async def test_scaling_goes_by_a_page_of_its_own_where_it_has_one_and_by_the_replicas_gpus_else(
    tmp_path: Path, engines: dict[str, str]
) -> None:
    own = b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 75\n'
    async with answering({"/metrics": documented("dcgm_4.txt")}) as exporter, answering({"/metrics": own}) as other:

        def config(**scaling: str) -> Config:
            gpu = {"url": f"http://{exporter}/metrics", "interval_s": 0.05}
            listed = [{"address": engines["vllm"], "labels": {"gpu_index": "0"}}]
            return configured(tmp_path, {"replicas": listed, "gpu": gpu, "scaling": {"max_replicas": 2, **scaling}})

        first = config()
        app = App(first)
        await app.start()
        try:
            scaling = app.router.pools["default"].scaling
            assert scaling is not None
            await until(partial(uses, scaling, 0.9))
            for url, use in ((f"http://{other}/metrics", 0.75), (None, 0.9)):
                changed = config() if url is None else config(gpu_url=url)
                app._reconfigure(first.model_copy(update={"pools": changed.pools}))
                await until(partial(uses, scaling, use))
        finally:
            await app.stop(grace_s=0)


async def test_ranks_behind_one_address_are_sampled_and_checked_apart_and_told_to_envoy_once(tmp_path: Path) -> None:
    forms = {"/metrics": documented("sglang_0.5_ranks.txt"), "/health": b"", "/v1/models": LIST}
    async with answering(forms) as address, answering({"/metrics": documented("dcgm_4.txt")}) as exporter:
        gpu = {"url": f"http://{exporter}/metrics", "interval_s": 0.05}
        app = App(configured(tmp_path, {"replicas": [address], "data_parallel": 2, "gpu": gpu}))
        await app.start()
        try:
            fleet = app.router.pools["default"].fleet
            await until(lambda: all(m.state(app._clock()) is State.READY and m.sample for m in fleet.members))
            waiting = {m.address: m.sample and m.sample.waiting for m in fleet.members}
            assert waiting == {f"{address}/0": 2, f"{address}/1": 0}
            assert [member.address for member in app._members()["default"]] == [address]
            await until(lambda: all(m.gpu_use(app._clock()) is not None for m in fleet.members))
            assert {m.engine for m in fleet.members} == {"sglang"}
            assert app._at(address) == list(fleet.members)
        finally:
            await app.stop(grace_s=0)
