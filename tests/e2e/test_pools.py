"""Several pools behind one Envoy: each model goes to its pool. There is one pool for each policy, so all of them serve here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from extproc.core.policies import REGISTRY
from extproc.envoy import names
from tests.e2e.stack import Json, Stack, chat, replica, stack

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

POLICIES = sorted(REGISTRY)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as exits:

        async def pool(policy: str) -> Json:
            replicas = [await exits.enter_async_context(replica(model=f"m-{policy}")) for _ in range(2)]
            return {
                "name": policy,
                "models": [f"m-{policy}"],
                "policy": policy,
                **({"gpu": {"nvml": True}} if policy == "gpu_utilization" else {}),
                "labels": {"gpu": "h200", "model_size": "8b", "max_tokens_per_s": "1000"},
                "replicas": [r.address for r in replicas],
            }

        pools = [await pool(policy) for policy in POLICIES]
        async with stack(tmp_path_factory.mktemp("stack"), *pools) as s:
            yield s


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(running: Stack) -> AsyncIterator[None]:
    await running.seen()
    yield
    await running.settled()


def members(running: Stack, policy: str) -> set[str]:
    return {m.address for m in running.app.router.pools[policy].fleet.members}


@pytest.mark.parametrize("policy", POLICIES)
async def test_each_policy_serves_its_own_pool(running: Stack, policy: str) -> None:
    async def one(i: int) -> str:
        return await running.served(
            {**chat(f"prompt {i} " * 50), "model": f"m-{policy}"}, headers={"x-session-id": "s"}
        )

    before = running.app.recorder.last(1)
    served = await asyncio.gather(*(one(i) for i in range(8)))
    await running.settled()
    records = running.since(before[0]) if before else running.app.recorder.last(8)
    assert {(r.decision.pool, r.decision.policy) for r in records} == {(policy, policy)}
    assert sorted(served) == sorted(r.decision.endpoints[0] for r in records)
    assert set(served) <= members(running, policy)


async def test_a_client_cannot_name_the_pool(running: Stack) -> None:
    headers = {names.POOL_HEADER: "random"}
    assert await running.served({**chat(), "model": "m-predicted"}, headers=headers) in members(running, "predicted")


async def test_a_model_of_no_pool_is_refused_with_the_models_there_are(running: Stack) -> None:
    async with running.post({**chat(), "model": "nope"}) as response:
        assert response.status == 404
        error = (await response.json())["error"]
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
    assert "m-predicted" in error["message"]


async def test_what_names_no_model_goes_to_the_first_pool(running: Stack) -> None:
    async with running.client.get(f"{running.url}/version") as response:
        assert response.headers[names.REPLICA_HEADER] in members(running, POLICIES[0])


async def test_the_models_of_all_pools_are_listed(running: Stack) -> None:
    async with running.client.get(f"{running.url}/v1/models") as response:
        assert names.REPLICA_HEADER not in response.headers
        assert {m["id"] for m in (await response.json())["data"]} == {f"m-{policy}" for policy in POLICIES}
