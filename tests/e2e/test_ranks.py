"""Data parallel ranks behind one address, through a real Envoy: which engine takes a request is said by header, and by us alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.core.ranks import endpoint_of
from extproc.envoy import bootstrap, endpoints, names
from tests.e2e.stack import Stack, all_ready, chat, configured, stack
from tests.support.backend import Backend
from tests.support.waiting import until

pytestmark = pytest.mark.envoy
RANKS = 4


@dataclass
class Scene:
    running: Stack
    members: list[Backend]

    def received(self) -> list[tuple[str, str | None]]:
        """Address and rank of each request that came."""
        return [(m.address, r.headers.get(names.RANK_HEADER)) for m in self.members for r in m.received]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as exits:
        members = [await exits.enter_async_context(Backend()) for _ in range(2)]
        pool = {
            "engine": "none",
            "models": ["sim"],
            "data_parallel": RANKS,
            "policy": "round_robin",
            "replicas": [m.address for m in members],
        }
        async with stack(tmp_path_factory.mktemp("stack"), pool, ready=False) as running:
            await until(lambda: all_ready(running.app))
            await until(lambda: knows(running, {m.address for m in members}))
            yield Scene(running, members)


async def knows(running: Stack, addresses: set[str]) -> bool:
    """Whether Envoy has these members."""
    return set((await running.envoy.clusters())[names.cluster_name("default")]) == addresses


@pytest.mark.asyncio(loop_scope="module")
async def test_each_engine_behind_each_address_gets_its_share(scene: Scene) -> None:
    for n in range(4 * RANKS):
        await scene.running.served(chat(f"prompt {n}"))
    await scene.running.settled()
    assert Counter(scene.received()) == {(m.address, str(rank)): 2 for m in scene.members for rank in range(RANKS)}


@pytest.mark.asyncio(loop_scope="module")
async def test_the_rank_that_came_is_the_one_that_was_decided_on_whatever_a_client_says(scene: Scene) -> None:
    for _ in range(RANKS):
        before = len(scene.received())
        served = await scene.running.served(headers={names.RANK_HEADER: "7"})
        decided = scene.running.last().decision.endpoints[0]
        assert endpoint_of(decided) == served
        assert len(scene.received()) == before + 1
        last = next(m for m in scene.members if m.address == served).received[-1]
        assert f"{served}/{last.headers[names.RANK_HEADER]}" == decided
    await scene.running.settled()


@pytest.mark.asyncio(loop_scope="module")
async def test_envoy_knows_each_address_once(scene: Scene) -> None:
    [members] = scene.running.app._members().values()
    assert sorted(member.address for member in members) == sorted(m.address for m in scene.members)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_address_that_is_drained_gets_nothing_on_any_of_its_ranks(scene: Scene) -> None:
    drained, other = scene.members
    at = f"{scene.running.admin}/replicas/{{}}?replica={drained.address}"
    async with scene.running.client.post(at.format("drain")) as answer:
        assert [view["state"] for view in await answer.json()] == ["draining"] * RANKS
    for _ in range(2 * RANKS):
        assert await scene.running.served() == other.address
    async with scene.running.client.post(at.format("undrain")) as answer:
        assert len(await answer.json()) == RANKS
    await scene.running.settled()


@pytest.mark.parametrize("tenants", [None, {"unknown": "anonymous"}], ids=["", "tenants"])
@pytest.mark.parametrize("pools", [1, 2])
def test_envoy_takes_the_rules_with_one_header_more(tmp_path: Path, tenants: Any, pools: int) -> None:
    """Its limit for the size of their expression is what the names are cut down for."""
    named = [
        {"name": f"p{i}", "models": [f"m{i}"], "replicas": [f"10.0.0.{i + 1}:8000"], "data_parallel": 2}
        for i in range(pools)
    ]
    config = configured(tmp_path, *named, **({"tenants": tenants} if tenants else {}))
    endpoints.create_if_missing(config)
    bootstrap.validate(bootstrap.write(config))
