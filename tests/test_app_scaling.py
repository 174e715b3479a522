"""The scaling signal of a whole process: KEDA asks over gRPC, a pool starts from zero."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp

from extproc.app import App
from extproc.config import Config, PoolConfig
from extproc.core.types import Route, Wait
from extproc.envoy.scaler import SERVICE
from extproc.pb.externalscaler.externalscaler_pb2 import (
    GetMetricsRequest,
    GetMetricsResponse,
    IsActiveResponse,
    ScaledObjectRef,
)
from extproc.settings import settings
from tests.core.support import request
from tests.e2e.stack import configured, replica
from tests.envoy.client import channel
from tests.support.waiting import until

CHAT = ScaledObjectRef(name="vllm", namespace="llm", scalerMetadata={"pool": "chat"})


def from_zero(directory: Path, *addresses: str) -> Config:
    (directory / "chat.json").write_text(json.dumps(list(addresses)))
    pool = {
        "name": "chat",
        "models": ["m"],
        "discovery": {"file": {"path": "chat.json"}},
        "scaling": {"min_replicas": 0, "max_replicas": 3, "interval_s": 0.2},
    }
    return configured(directory, pool)


async def ask(app: App, method: str, message: bytes) -> bytes:
    async with channel(app.config.listen.grpc) as opened:
        found = await opened.unary_unary(f"/{SERVICE}/{method}")(message)
        assert isinstance(found, bytes)
        return found


async def active(app: App) -> bool:
    return IsActiveResponse.FromString(await ask(app, "IsActive", CHAT.SerializeToString())).result


async def desired(app: App) -> int:
    asked = GetMetricsRequest(scaledObjectRef=CHAT).SerializeToString()
    return GetMetricsResponse.FromString(await ask(app, "GetMetrics", asked)).metricValues[0].metricValue


async def test_a_pool_starts_from_zero_when_a_request_waits(tmp_path: Path) -> None:
    app = App(from_zero(tmp_path))
    await app.start()
    try:
        assert app.not_ready() is None
        assert (await active(app), await desired(app)) == (False, 0)
        clock = app._clock
        verdict = app.router.arrive(request("Hello"), clock())
        assert isinstance(verdict, Wait)
        assert await active(app)
        await until(lambda: desired(app))
        assert await desired(app) == 1
        turn = app._server.holding.wait(verdict.ticket)
        async with replica() as served:
            (tmp_path / "new.json").write_text(json.dumps([served.address]))
            (tmp_path / "new.json").rename(tmp_path / "chat.json")
            await until(turn.done)
            routed = turn.result()
            assert isinstance(routed, Route)
            assert routed.endpoints == (served.address,)
        async with aiohttp.ClientSession() as http, http.get(f"http://{app.config.listen.http}/metrics") as page:
            assert 'extproc_desired_replicas{pool="chat"} 1.0' in await page.text()
    finally:
        await app.stop(grace_s=0)


def test_a_pool_that_may_be_empty_waits_for_as_long_as_a_start_may_take() -> None:
    held = PoolConfig.model_validate({"replicas": ["10.0.0.1:8000"], "scaling": {"min_replicas": 0}})
    usual = PoolConfig.model_validate({"replicas": ["10.0.0.1:8000"], "scaling": {}})
    assert settings(held).queue.absent_wait_s == 180.0
    assert settings(usual).queue.absent_wait_s == 10.0
    assert Config(pools=(held,)).hold_limit_s == 195.0
    assert settings(usual).scaling is not None
    assert settings(PoolConfig.model_validate({"replicas": ["10.0.0.1:8000"]})).scaling is None
