"""LoRA adapters through a real Envoy: asked for where they are listed, and kept where they are loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from extproc.sim.backend import Backend
from tests.e2e.stack import MODEL, Stack, chat, gathered, replica, stack
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]

HERE, A, B = "only-here", "adapter-a", "adapter-b"


@dataclass
class Scene:
    running: Stack
    members: list[Backend]

    async def ask(self, model: str, n: int) -> str:
        """Who answered."""
        return await self.running.chosen(chat(f"question {n} for {model}", model=model))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    lists: list[dict[str, Any]] = [{"adapters": (A, B, HERE)}, {"adapters": (A, B)}]
    async with AsyncExitStack() as exits:
        given = [replica(max_loras=1, lora_load_s=0.3, **each) for each in lists]
        members = [await exits.enter_async_context(each) for each in given]
        pool = {"models": [MODEL], "replicas": [m.address for m in members]}
        async with stack(tmp_path_factory.mktemp("lora"), pool) as running:
            yield Scene(running, members)


async def test_an_adapter_that_one_replica_lists_is_asked_for_there(scene: Scene) -> None:
    assert {await scene.ask(HERE, n) for n in range(8)} == {scene.members[0].address}
    assert len(set(await gathered(12, lambda n: scene.running.served(chat(f"question {n}"))))) == 2


async def test_with_one_slot_each_an_adapter_stays_where_it_is_loaded(scene: Scene) -> None:
    at = {A: await scene.ask(A, 0)}
    at[B] = await scene.ask(B, 0)
    assert at[A] != at[B]
    before = [m.engine.adapters.loads for m in scene.members if m.engine.adapters is not None]
    for n in range(1, 9):
        assert {A: await scene.ask(A, n), B: await scene.ask(B, n)} == at
    assert [m.engine.adapters.loads for m in scene.members if m.engine.adapters is not None] == before


async def test_one_for_which_no_slot_is_free_is_held_until_one_is(scene: Scene) -> None:
    router = scene.running.app.router
    long = chat("a long answer", model=A, stream=True, max_tokens=400, ignore_eos=True)
    async with scene.running.post({**long, "model": HERE}) as here, scene.running.post(long) as there:
        await here.content.readany()
        await there.content.readany()
        await until(lambda: [member.load.lora and member.load.lora.slots for _, member in router.members()] == [1, 1])
        asked = asyncio.create_task(scene.running.served(chat(model=B)))
        await until(lambda: router.holding == 1)
        assert await scene.ask(MODEL, 1)
        assert not asked.done()
        await here.read()
        await there.read()
    assert await asked in {member.address for member in scene.members}
    assert router.holding == 0


async def test_requests_for_adapters_are_counted_by_whether_they_had_to_wait_for_a_load(scene: Scene) -> None:
    held = scene.running.metric("extproc_lora_requests_total", pool="default", adapter="held")
    loaded = scene.running.metric("extproc_lora_requests_total", pool="default", adapter="loaded")
    assert held >= 16
    assert 2 <= loaded <= 6
    assert scene.running.metric("extproc_lora_load_seconds", pool="default") > 0
