"""Envoy does as extproc decided, and as nobody else says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from extproc.sim.backend import Backend as Replica
from tests.e2e.stack import Stack, chat, gathered, replica, stack

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as exits:
        yield [await exits.enter_async_context(replica()) for _ in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(fleet: list[Replica], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with stack(tmp_path_factory.mktemp("stack"), {"replicas": [r.address for r in fleet]}) as s:
        yield s


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(running: Stack) -> AsyncIterator[None]:
    """No test leaves a flight open."""
    yield
    await running.settled()


async def test_every_decision_is_followed_with_long_prompts(running: Stack, fleet: list[Replica]) -> None:
    before = {r.address: r.served for r in fleet}

    async def one(i: int) -> str:
        return await running.served(chat(f"{i} " * 100_000, max_tokens=2), path=f"/v1/chat/completions?i={i}")

    answered = await gathered(100, one, at_once=4)
    await running.settled()
    records = running.app.recorder.last(100)
    assert {r.ended.outcome.attempts for r in records if r.ended} == {1}
    assert all(r.ended and r.ended.outcome.served == r.decision.endpoints[0] for r in records)
    chosen = sorted(r.decision.endpoints[0] for r in records)
    assert sorted(answered) == chosen
    assert {r.address: r.served - before[r.address] for r in fleet} == {a.address: chosen.count(a.address) for a in fleet}
