"""The parts of `tests.bench.fleet_sim`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.sim.traces import Trace, Turn
from tests.bench import fleet_pushes, fleet_sim
from tests.bench.fleet_sim import Runs
from tests.bench.matrix.runs import Figures
from tests.bench.matrix.windows import Source

FIGURES = Figures(1.0, 2.0, 3.0, 0.9, 0.5, 0, 100)
SMALL = Source("chat", 60, 3)


def test_turns_are_spread_over_the_step_in_which_they_were_recorded() -> None:
    trace = Trace("t", 64, tuple(Turn(100, 10, at) for at in (0.0, 0.0, 3.0, 9.0)))
    spread = [turn.delay_s for turn in fleet_sim.spread(trace, 1).turns]
    assert all(at <= found < at + 3.0 for at, found in zip((0.0, 0.0, 3.0, 9.0), spread, strict=True))
    assert len(set(spread)) == 4


def test_figures_are_compared_seed_by_seed() -> None:
    two = {1: [FIGURES, replace(FIGURES, hit=0.25)], 8: [replace(FIGURES, hit=0.4), replace(FIGURES, hit=0.25)]}
    assert fleet_sim.against_one(two, "hit") == {"1": 1.0, "8": pytest.approx(0.9)}
    assert fleet_sim.document(Runs(two, two))["hit"] == 0.375


def test_the_load_of_a_dead_router_is_forgotten_within_three_seconds() -> None:
    assert 0.0 < fleet_sim.router_death_s(replace(SMALL, requests=400), 1) < 3.0


@pytest.mark.parametrize("push", [True, False])
async def test_what_pushes_cost_can_be_measured(push: bool) -> None:
    row = await fleet_pushes.measure(2, 3, 40.0, push, seconds=0.6, warm_s=0.1)
    assert row["redis_bytes_per_s_per_router"] > 0
    assert (row["pushes_per_s_per_router"] > 0) is push
    assert 0 < row["learned_after_ms"]["p50"] <= row["learned_after_ms"]["p99"]
