"""Which headers reach whom: clients steer nothing, replicas see nothing of ours, extproc sees no keys."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
import pytest_asyncio

from extproc.envoy import names
from tests.e2e.stack import Json, Stack, chat, stack
from tests.support.backend import Backend
from tests.support.ports import free_port
from tests.support.relay import Relay

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Scene:
    running: Stack
    members: list[Backend]
    stranger: Backend
    """Listens, and is no member of the pool."""
    relay: Relay
    """Between Envoy and extproc."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as exits:
        members = [await exits.enter_async_context(Backend()) for _ in range(2)]
        stranger = await exits.enter_async_context(Backend())
        grpc = f"127.0.0.1:{free_port()}"
        relay = await exits.enter_async_context(Relay(grpc, keep=True))

        def through_relay(rendered: Json) -> None:
            [cluster] = [c for c in rendered["static_resources"]["clusters"] if c["name"] == names.SERVICE_CLUSTER]
            host = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            host["address"]["socket_address"]["port_value"] = relay.port

        pool = {"engine": "none", "models": ["sim"], "replicas": [m.address for m in members]}
        listen = {"grpc": grpc, "http": f"127.0.0.1:{free_port()}"}
        at = tmp_path_factory.mktemp("stack")
        async with stack(at, pool, listen=listen, change=through_relay) as running:
            yield Scene(running, members, stranger, relay)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(scene: Scene) -> AsyncIterator[None]:
    await scene.running.seen()
    yield
    await scene.running.settled()


async def test_no_header_of_a_client_steers(scene: Scene) -> None:
    home = await scene.running.served(chat("one prompt" * 100))
    other = next(m.address for m in scene.members if m.address != home)
    spoofed = [
        {name: value}
        for name in (names.DESTINATION, names.SERVED, names.SUBSET, names.POOL_HEADER, names.REPLICA_HEADER)
        for value in (other, scene.stranger.address, "default", f"{scene.stranger.address},{other}")
    ]
    for headers in spoofed:
        await scene.running.settled()  # idle replicas: then the prefix alone decides
        assert await scene.running.served(chat("one prompt" * 100), headers=headers) == home, headers
        assert scene.running.last().decision.endpoints[0] == home
    assert scene.stranger.received == []


async def test_a_path_that_is_not_read_is_not_steered_either(scene: Scene) -> None:
    for path in ("/v1/models", "/health", "/anything"):
        async with scene.running.client.get(
            f"{scene.running.url}{path}", headers={names.DESTINATION: scene.stranger.address}
        ) as response:
            assert await response.text() in {m.address for m in scene.members}
    assert scene.stranger.received == []


async def test_control_and_private_headers_stop_before_the_replica(scene: Scene) -> None:
    ours = dict.fromkeys((*names.CONTROL_HEADERS, *names.PRIVATE_HEADERS), "60000")
    theirs = {"authorization": "Bearer k", "x-api-key": "k2", "x-request-id": "r-1", "x-trace": "t"}
    served = await scene.running.served(headers={**ours, **theirs})
    received = next(m for m in scene.members if m.address == served).received[-1]
    assert not set(ours) & set(received.headers)
    assert theirs.items() <= received.headers.items()
    assert json.loads(received.body) == chat()


async def test_keys_never_reach_extproc_and_what_it_reads_does(scene: Scene) -> None:
    secrets = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
    headers = {name: f"hush-{name}" for name in secrets}
    await scene.running.served(headers={**headers, "x-session-id": "told-session"})
    assert b"told-session" in scene.relay.sent
    assert b"hush-" not in scene.relay.sent


async def test_the_session_header_reaches_the_decision_alone(scene: Scene) -> None:
    served = await scene.running.served(headers={"x-session-id": "s", "x-request-priority": "3"})
    received = next(m for m in scene.members if m.address == served).received[-1]
    assert not {"x-session-id", "x-request-priority"} & set(received.headers)
