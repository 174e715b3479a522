"""Against real vLLM: the simulated engine finds as much in the prefix cache, to the block, for every request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from extproc.sim.traces import Generate
from tests.bench.sim_vllm import Played, play
from tests.bench.sim_vllm_plan import SESSIONS
from tests.bench.sim_vllm_real import Options, Served, replicas

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

HALF: Generate = SESSIONS.model_copy(update={"sessions": 60})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[Served]:
    async with replicas() as both:
        yield both


def report(run: Played, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n  {json.dumps(run.hits_in_step() or run.hits())}")


async def test_one_at_a_time_every_hit_is_the_same(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    run = await play(served, 1, Options(seed=2), sessions=HALF)
    report(run, capsys)
    assert run.hits()["different"] == []


async def test_several_at_a_time_every_step_and_hit_is_the_same(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """More at a time than share a step, so some queue; the cache is hardly large enough for eight, so a few may be preempted."""
    run = await play(served, 12, Options(seed=3), sessions=HALF)
    report(run, capsys)
    found = run.hits_in_step()
    assert found is not None
    assert found["different_steps"] == 0
    assert found["different"] == []
