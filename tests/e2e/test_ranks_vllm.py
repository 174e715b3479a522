"""Data parallel ranks of a real vLLM behind Envoy: requests run where they were sent, and find there what ran there before."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from extproc.adapters.engines import ENGINES
from extproc.core.ranks import rank_of
from extproc.envoy import names
from tests.e2e.stack import Stack, all_ready, stack
from tests.e2e.vllm import MODEL, NUM_BLOCKS, Vllm
from tests.support.waiting import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]


@dataclass
class Scene:
    running: Stack
    engine: Vllm

    async def generated(self) -> dict[int, float]:
        """Tokens generated so far by each rank, by vLLM's own count."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.engine.url}/metrics") as response:
            ranks = ENGINES["vllm"].parse_ranks(await response.read())
        return {rank: sample.generated_tokens or 0.0 for rank, sample in ranks.items()}

    async def ask(self, prompt: str) -> tuple[int, int]:
        """The rank that was decided on, and the prompt's tokens that were cached there."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 8, "ignore_eos": True}
        async with self.running.post(body) as response:
            answer: Any = await response.json()
            assert response.status == 200, answer
        rank = rank_of(self.running.last().decision.endpoints[0])
        assert rank is not None
        return rank, (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    at = tmp_path_factory.mktemp("ranks")
    async with Vllm(at, "--data-parallel-size", "2") as engine:
        await engine.ready()
        pool = {"models": [MODEL], "replicas": [engine.address], "data_parallel": 2}
        async with stack(at, pool, ready=False) as running:
            await until(lambda: all_ready(running.app), timeout_s=30)
            await until(lambda: knows(running, engine.address), timeout_s=30)
            yield Scene(running, engine)


async def knows(running: Stack, address: str) -> bool:
    return address in (await running.envoy.clusters())[names.cluster_name("default")]


async def test_requests_run_on_the_rank_that_was_decided_on(scene: Scene) -> None:
    before = await scene.generated()
    asked = Counter([(await scene.ask(f"prompt {n}, unlike all the others " * 10))[0] for n in range(16)])
    assert set(asked) == {0, 1}

    async def all_told() -> bool:
        after = await scene.generated()
        return {rank: after[rank] - before[rank] for rank in after} == {rank: 8.0 * n for rank, n in asked.items()}

    await until(all_told, timeout_s=30)


async def test_a_conversation_goes_back_to_the_rank_that_has_it(scene: Scene) -> None:
    for conversation in range(4):
        text = f"conversation {conversation} " * 60
        rank, cached = await scene.ask(text)
        for turn in range(3):
            text += f"and turn {turn} of it " * 5
            again, found = await scene.ask(text)
            assert again == rank
            assert found > cached
            cached = found


async def test_each_rank_has_its_part_of_the_cache(scene: Scene) -> None:
    members = scene.running.app.router.pools["default"].fleet.members
    assert [m.sample and m.sample.num_blocks for m in members] == [NUM_BLOCKS, NUM_BLOCKS]
