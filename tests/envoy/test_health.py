from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from extproc.envoy import rpc
from extproc.envoy.codec import NOT_SERVING, SERVICE_UNKNOWN, SERVING
from extproc.envoy.health import NAMES, SERVICE, Health
from extproc.pb.grpc.health.v1.health_pb2 import HealthCheckRequest
from tests.envoy.client import channel

ADDRESS = "127.0.0.1:21221"


@pytest.fixture
async def health() -> AsyncIterator[tuple[Health, Any]]:
    state = Health()
    server = rpc.server([state.service()], 1024)
    server.add_insecure_port(ADDRESS)
    await server.start()
    async with channel(ADDRESS) as opened:
        yield state, opened
    await server.stop(0)


async def check(opened: Any, name: str) -> bytes:
    answer: bytes = await opened.unary_unary(f"/{SERVICE}/Check")(HealthCheckRequest(service=name).SerializeToString())
    return answer


def watch(opened: Any, name: str) -> Any:
    return opened.unary_stream(f"/{SERVICE}/Watch")(HealthCheckRequest(service=name).SerializeToString())


async def test_check_answers_for_every_name(health: tuple[Health, Any]) -> None:
    state, opened = health
    assert [await check(opened, name) for name in NAMES] == [SERVING] * len(NAMES)
    state.stop_serving()
    answers = {name: await check(opened, name) for name in NAMES}
    assert answers.pop("liveness") == SERVING
    assert set(answers.values()) == {NOT_SERVING}


async def test_check_of_an_unknown_name(health: tuple[Health, Any]) -> None:
    with pytest.raises(rpc.grpc.aio.AioRpcError) as raised:
        await check(health[1], "other")
    assert raised.value.code() is rpc.NOT_FOUND


async def test_watch_tells_the_change_and_ends(health: tuple[Health, Any]) -> None:
    state, opened = health
    call = watch(opened, "readiness")
    assert await call.read() == SERVING
    state.stop_serving()
    assert await call.read() == NOT_SERVING
    assert await call.read() is rpc.EOF


async def test_watch_after_the_change_tells_it_at_once(health: tuple[Health, Any]) -> None:
    state, opened = health
    state.stop_serving()
    call = watch(opened, "")
    assert await call.read() == NOT_SERVING
    assert await call.read() is rpc.EOF


async def test_watch_of_an_unknown_name(health: tuple[Health, Any]) -> None:
    assert await watch(health[1], "other").read() == SERVICE_UNKNOWN


def test_repr() -> None:
    state = Health()
    assert repr(state) == "<health serving>"
    state.stop_serving()
    assert repr(state) == "<health not serving>"
