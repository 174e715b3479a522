from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from extproc.core.steptime import StepTime
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, Token
from extproc.sim.realtime import Flow, RealtimeEngine
from tests.support.waiting import until

MILLISECOND = StepTime(c0=0.001, w=0, g=0, a=0, k=0, s=0)


@pytest.fixture
async def live() -> AsyncIterator[RealtimeEngine]:
    engine = RealtimeEngine(Engine(EngineConfig(MILLISECOND, num_blocks=100, cpu_overhead_s=0)))
    engine.start()
    yield engine
    await engine.stop()


async def collected(flow: Flow) -> list[Token]:
    tokens: list[Token] = []
    while not tokens or not tokens[-1].finished:
        tokens += await flow.get()
    return tokens


async def test_a_flow_that_wants_every_token_gets_every_token(live: RealtimeEngine) -> None:
    flow = Flow(every=True)
    live.submit([EngineRequest(1, 10, 7)], flow)
    assert [t.position for t in await collected(flow)] == list(range(7))


async def test_a_flow_that_wants_the_ends_gets_the_ends(live: RealtimeEngine) -> None:
    flow = Flow(every=False)
    live.submit([EngineRequest(1, 10, 7)], flow)
    assert [t.position for t in await collected(flow)] == [0, 6]


async def test_an_idle_engine_wakes_for_the_next_request(live: RealtimeEngine) -> None:
    for i in range(3):
        flow = Flow(every=True)
        live.submit([EngineRequest(i, 10, 2)], flow)
        await asyncio.wait_for(collected(flow), 5)
        await until(lambda: live.gauges.running == 0)


async def test_gauges_speak_only_at_the_end_of_a_step(live: RealtimeEngine) -> None:
    live.hang = True
    live.submit([EngineRequest(1, 10, 1000)], Flow(every=True))
    assert (live.gauges.running, live.gauges.waiting) == (0, 0)
    assert live.engine.waiting == 1
    live.hang = False
    await until(lambda: live.gauges.running == 1)
    live.withdraw([1])
    assert live.gauges.running == 0
    assert repr(live) == "<realtime x1, 0 awaited, <engine 0 running, 0 waiting, 0% kv>>"


async def test_what_the_engine_refuses_is_an_error_of_the_caller(live: RealtimeEngine) -> None:
    with pytest.raises(ValueError, match="too_long"):
        live.submit([EngineRequest(1, 1600, 1)], Flow(every=True))
