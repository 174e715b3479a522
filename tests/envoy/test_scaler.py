"""The external scaler, asked as KEDA asks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from extproc.envoy import rpc
from extproc.envoy.rpc import EOF, grpc
from extproc.envoy.scaler import MAX_STREAMS, SERVICE, Scale, Scaler
from extproc.envoy.scaler_codec import METRIC
from extproc.pb.externalscaler.externalscaler_pb2 import (
    GetMetricSpecResponse,
    GetMetricsRequest,
    GetMetricsResponse,
    IsActiveResponse,
    ScaledObjectRef,
)
from tests.envoy.client import channel
from tests.support.waiting import until


class Keda:
    """One client of one scaler, whose pools the test sets."""

    def __init__(self, scaler: Scaler, pools: dict[str, Scale], opened: Any) -> None:
        self.scaler, self.pools, self._opened = scaler, pools, opened

    async def ask(self, method: str, message: bytes) -> bytes:
        found = await self._opened.unary_unary(f"/{SERVICE}/{method}")(message)
        assert isinstance(found, bytes)
        return found

    def stream(self, message: bytes) -> Any:
        return self._opened.unary_stream(f"/{SERVICE}/StreamIsActive")(message)


@asynccontextmanager
async def serving(**pools: Scale) -> AsyncIterator[Keda]:
    def scales(name: str | None) -> Scale | None:
        if name is None and len(pools) == 1:
            return next(iter(pools.values()))
        return pools.get(name or "")

    scaler = Scaler(scales)
    server = rpc.server([scaler.service()], 1 << 20)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with channel(f"127.0.0.1:{port}") as opened:
            yield Keda(scaler, pools, opened)
    finally:
        scaler.close()
        await server.stop(5)


def ref(**metadata: str) -> ScaledObjectRef:
    return ScaledObjectRef(name="vllm", namespace="llm", scalerMetadata=metadata)


async def test_the_metric_is_the_number_of_replicas_and_its_target_one() -> None:
    async with serving(chat=Scale(7, True), code=Scale(2, True)) as keda:
        spec = GetMetricSpecResponse.FromString(
            await keda.ask("GetMetricSpec", ref(pool="chat").SerializeToString())
        ).metricSpecs[0]
        assert (spec.metricName, spec.targetSize, spec.targetSizeFloat) == (METRIC, 1, 1.0)
        for pool, replicas in (("chat", 7), ("code", 2)):
            asked = GetMetricsRequest(scaledObjectRef=ref(pool=pool), metricName=spec.metricName)
            found = GetMetricsResponse.FromString(await keda.ask("GetMetrics", asked.SerializeToString()))
            (value,) = found.metricValues
            assert (value.metricName, value.metricValue, value.metricValueFloat) == (METRIC, replicas, float(replicas))


@pytest.mark.parametrize("active", [True, False])
async def test_activity_is_told(active: bool) -> None:
    async with serving(chat=Scale(0, active)) as keda:
        found = await keda.ask("IsActive", ref(pool="chat").SerializeToString())
        assert IsActiveResponse.FromString(found).result is active


async def test_the_only_pool_that_scales_need_not_be_named() -> None:
    async with serving(chat=Scale(3, True)) as keda:
        asked = GetMetricsRequest(scaledObjectRef=ref()).SerializeToString()
        found = GetMetricsResponse.FromString(await keda.ask("GetMetrics", asked))
        assert found.metricValues[0].metricValue == 3


@pytest.mark.parametrize(
    ("method", "message", "code", "text"),
    [
        ("IsActive", ref(pool="other").SerializeToString(), "NOT_FOUND", "pool 'other' does not scale here"),
        ("GetMetricSpec", ref().SerializeToString(), "NOT_FOUND", "several pools scale here, or none"),
        ("IsActive", b"\xff", "INVALID_ARGUMENT", "ScaledObjectRef of 1 bytes"),
        ("GetMetrics", b"\xff", "INVALID_ARGUMENT", "GetMetricsRequest of 1 bytes"),
    ],
)
async def test_what_cannot_be_answered_is_an_error_that_says_why(
    method: str, message: bytes, code: str, text: str
) -> None:
    async with serving(chat=Scale(1, True), code=Scale(1, True)) as keda:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await keda.ask(method, message)
        assert failed.value.code().name == code
        assert text in failed.value.details()


async def test_a_stream_tells_the_state_and_each_change_and_ends_when_we_stop() -> None:
    async with serving(chat=Scale(0, False)) as keda:
        call = keda.stream(ref(pool="chat").SerializeToString())
        assert IsActiveResponse.FromString(await call.read()).result is False
        keda.pools["chat"] = Scale(1, True)
        assert IsActiveResponse.FromString(await call.read()).result is True
        keda.scaler.close()
        assert await call.read() is EOF
        assert (await call.code()).name == "OK"


async def test_a_stream_that_keda_leaves_is_forgotten() -> None:
    async with serving(chat=Scale(1, True)) as keda:
        call = keda.stream(ref(pool="chat").SerializeToString())
        await call.read()
        assert repr(keda.scaler) == "<scaler with 1 streams>"
        call.cancel()
        await until(lambda: repr(keda.scaler) == "<scaler with 0 streams>")


async def test_streams_are_bounded() -> None:
    async with serving(chat=Scale(1, True)) as keda:
        message = ref(pool="chat").SerializeToString()
        calls = [keda.stream(message) for _ in range(MAX_STREAMS)]
        await asyncio.gather(*(call.read() for call in calls))
        one_more = keda.stream(message)
        with pytest.raises(grpc.aio.AioRpcError):
            await one_more.read()
        assert (await one_more.code()).name == "RESOURCE_EXHAUSTED"


async def test_right_after_a_start_nothing_is_claimed() -> None:
    async with serving(chat=Scale(None, False)) as keda:
        asked = GetMetricsRequest(scaledObjectRef=ref(pool="chat")).SerializeToString()
        for method, message in (("GetMetrics", asked), ("IsActive", ref(pool="chat").SerializeToString())):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await keda.ask(method, message)
            assert failed.value.code().name == "UNAVAILABLE"
            assert failed.value.details() == "the members of the pool are not known yet"
        call = keda.stream(ref(pool="chat").SerializeToString())
        keda.pools["chat"] = Scale(3, True)
        assert IsActiveResponse.FromString(await call.read()).result is True
