"""LoRA adapters of two real vLLM behind Envoy: asked for where they are listed, and kept where they are loaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from extproc.adapters.engines import ENGINES
from extproc.core.fleet import Member
from extproc.envoy import names
from tests.e2e.adapter import write_adapter
from tests.e2e.stack import Stack, chat, gathered, stack
from tests.e2e.vllm import MODEL, Vllm, paths
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

HERE, A, B, LATE = "only-here", "adapter-a", "adapter-b", "loaded-late"


@dataclass
class Scene:
    running: Stack
    one: Vllm
    other: Vllm

    async def ask(self, model: str, n: int) -> str:
        """Who answered."""
        return await self.running.chosen(chat(f"question {n} for {model}", model=model, max_tokens=8, ignore_eos=True))

    def lists(self, replica: Vllm) -> bool:
        """Whether the replica is believed to have it."""
        return LATE in self.member(replica.address).models

    def member(self, address: str) -> Member:
        found = self.running.app.router.pools["default"].fleet.get(address)
        assert found is not None
        return found


async def change(replica: Vllm, what: str, **more: str) -> None:
    """Load or unload an adapter while it runs."""
    url = f"{replica.url}/v1/{what}_lora_adapter"
    async with aiohttp.ClientSession() as http, http.post(url, json={"lora_name": LATE, **more}) as response:
        assert response.status == 200, await response.text()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    at = tmp_path_factory.mktemp("lora")
    adapter = write_adapter(at / "adapter", paths()[1])
    options = ("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "4", "--lora-modules")
    both = (f"{A}={adapter}", f"{B}={adapter}")
    async with Vllm(at, *options, *both, f"{HERE}={adapter}") as one, Vllm(at, *options, *both) as other:
        await one.ready()
        await other.ready()
        for replica in (one, other):
            await change(replica, "load", lora_path=str(adapter))
        scrape = {"interval_s": 0.1, "idle_interval_s": 0.5, "models_interval_s": 600}
        pool = {"models": [MODEL], "replicas": [one.address, other.address], "scrape": scrape}
        async with stack(at, pool) as running:
            yield Scene(running, one, other)


async def test_an_adapter_that_one_replica_lists_is_asked_for_there(scene: Scene) -> None:
    assert {await scene.ask(HERE, n) for n in range(8)} == {scene.one.address}
    assert len(set(await gathered(12, lambda n: scene.running.served(chat(f"question {n}", model=MODEL))))) == 2


async def test_with_one_slot_each_an_adapter_stays_where_it_is_loaded(scene: Scene) -> None:
    at = {A: await scene.ask(A, 0)}
    at[B] = await scene.ask(B, 0)
    assert at[A] != at[B]
    for n in range(1, 9):
        assert {A: await scene.ask(A, n), B: await scene.ask(B, n)} == at


async def test_the_replica_tells_its_slots(scene: Scene) -> None:
    def told() -> bool:
        return all(
            member.sample is not None and member.sample.adapters is not None and member.sample.adapters.slots == 1
            for member in map(scene.member, (scene.one.address, scene.other.address))
        )

    await until(told, timeout_s=30)
    assert "lora_requests_info" in ENGINES["vllm"].table.adapters


async def test_one_loaded_and_unloaded_while_it_runs(scene: Scene) -> None:
    """The request that the replica answers with 404 has its list read again, long before that is due."""
    at = await scene.ask(LATE, 0)
    holder, other = (scene.one, scene.other) if at == scene.one.address else (scene.other, scene.one)
    await change(holder, "unload")
    assert scene.lists(holder)
    await scene.running.seen()
    async with scene.running.post(chat("again", model=LATE)) as response:
        assert (response.status, response.headers[names.REPLICA_HEADER]) == (404, holder.address)
    await until(lambda: not scene.lists(holder))
    assert {await scene.ask(LATE, n) for n in range(1, 5)} == {other.address}
