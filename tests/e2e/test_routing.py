"""Envoy does as extproc decided, and extproc decides by where the prefix lies and how much stands before it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from extproc.sim.backend import Backend as Replica
from tests.e2e.stack import Json, Stack, chat, gathered, replica, stack
from tests.support.waiting import until

pytestmark = [pytest.mark.envoy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet() -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as exits:
        # Fifty times faster than real, so that long prompts cost no time here; the predictions are those of a real one.
        yield [await exits.enter_async_context(replica(time_scale=0.02)) for _ in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(fleet: list[Replica], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with stack(tmp_path_factory.mktemp("stack"), {"replicas": [r.address for r in fleet]}) as s:
        yield s


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def settles(running: Stack) -> AsyncIterator[None]:
    """No test leaves a flight open."""
    await running.seen()
    yield
    await running.settled()


async def test_each_of_a_hundred_long_requests_goes_where_it_was_decided(running: Stack, fleet: list[Replica]) -> None:
    size = 200_000
    before = Counter({r.address: r.served for r in fleet})

    async def one(i: int) -> str:
        return await running.served(chat(f"{i:04d}" + "x" * (size + i), max_tokens=2))

    answered = await gathered(100, one, at_once=8)
    await running.settled()
    # Each prompt has a length of its own, by which its decision is found again.
    records = {r.ended.flight.prompt_bytes or 0: r for r in running.app.recorder.last(100) if r.ended}
    by_size = [records[n] for n in sorted(records)]
    assert len(by_size) == 100
    assert [r.decision.endpoints[0] for r in by_size] == answered
    assert [(r.ended.outcome.served, r.ended.outcome.attempts) for r in by_size if r.ended] == [
        (a, 1) for a in answered
    ]
    assert Counter({r.address: r.served for r in fleet}) - before == Counter(answered)
    assert len(set(answered)) == len(fleet)


async def test_the_turns_of_a_session_stay_until_their_replica_is_loaded(running: Stack, fleet: list[Replica]) -> None:
    history = [{"role": "user", "content": "Once upon a time. " * 2000}]

    def turn(text: str) -> Json:
        return {**chat(max_tokens=4), "messages": [*history, {"role": "user", "content": text}]}

    home = await running.served(turn("first"))
    for i in range(4):
        await running.settled()  # what still runs there would be a reason to go elsewhere
        history += [{"role": "assistant", "content": f"answer {i}"}, {"role": "user", "content": f"question {i}"}]
        assert await running.served(turn("go on")) == home
        assert running.last().decision.reason == "prefix"
    await running.settled()
    before = running.last()
    held = next(r for r in fleet if r.address == home)
    held.hang = True  # what is sent there now stays, and stands before all that follows
    burst = asyncio.gather(*(running.served(turn(f"{i} " * 500)) for i in range(120)))
    await until(lambda: len(running.since(before)) == 120)
    held.hang = False
    served = await burst
    decisions = [r.decision for r in running.since(before)]
    assert (decisions[0].endpoints[0], decisions[0].reason) == (home, "prefix")
    assert "spill" in {d.reason for d in decisions}
    assert 1 < served.count(home) < 120
    assert Counter(served) == Counter(d.endpoints[0] for d in decisions)


async def test_a_repeated_prompt_hits_the_cache_that_was_predicted(running: Stack) -> None:
    prompt = chat("Tell me of the sea. " * 400)
    first = await running.served(prompt)
    record = await running.ended()
    assert record.decision.prediction.cached_tokens == 0
    actual = running.metric("extproc_actual_cached_tokens_total", pool="default")
    assert await running.served(prompt) == first
    record = await running.ended()
    assert record.ended is not None
    assert record.ended.outcome.usage is not None
    hit = record.ended.outcome.usage.cached_tokens
    assert hit is not None
    assert hit > 1500
    assert abs(record.decision.prediction.cached_tokens - hit) < 200
    assert running.metric("extproc_actual_cached_tokens_total", pool="default") == actual + hit


async def test_explain_over_http_tells_what_the_next_request_then_gets(running: Stack) -> None:
    prompt = chat("Tell me of the hills. " * 400)
    await running.served(prompt)
    await running.settled()
    async with running.client.post(f"{running.admin}/debug/explain", data=json.dumps(prompt)) as response:
        told = await response.json()
    assert await running.served(prompt) == told["endpoints"][0]
    assert len(told["candidates"]) == 3
    assert running.last().decision.reason == told["reason"] == "prefix"
