from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest

from extproc.core.steptime import MEASURED, prior
from extproc.sim.engine import EngineConfig
from extproc.sim.fit import EVALUATIONS, ROUNDS, fit, mismatch
from extproc.sim.replay import Timed, replay

TRUTH = EngineConfig(MEASURED[8, "h100", 1], num_blocks=1500, max_num_batched_tokens=2048, cpu_overhead_s=0.0)
UNKNOWN = replace(TRUTH, step_time=prior({}))
"""The same engine on a GPU taken for half as fast."""


def served(count: int, config: EngineConfig, gap_s: float = 0.15) -> list[Timed]:
    """A load that queues for blocks, as this engine serves it."""
    rnd = random.Random(3)
    at_s = 0.0
    load = []
    for _ in range(count):
        at_s += rnd.expovariate(1 / gap_s)
        load.append(Timed(rnd.randint(50, 3000), rnd.randint(20, 120), at_s, 0.0, 0.0, 0.0))
    return replay(load, config)


@pytest.fixture(scope="module")
def fitted() -> tuple[list[Timed], EngineConfig]:
    """40 requests, and the engine fitted to the first half of them."""
    real = served(40, TRUTH)
    return real, replace(UNKNOWN, step_time=fit(real, UNKNOWN, range(20)))


def test_a_fit_to_some_requests_foretells_the_others(fitted: tuple[list[Timed], EngineConfig]) -> None:
    real, engine = fitted
    before, after = (replay(real, config)[20:] for config in (UNKNOWN, engine))
    ttft_s = fmean(t.ttft_s for t in real[20:])
    assert fmean(t.ttft_s for t in before) > 1.5 * ttft_s
    assert fmean(t.ttft_s for t in after) == pytest.approx(ttft_s, rel=0.05)


def test_the_fit_takes_a_bounded_number_of_replays_and_is_the_same_again(
    fitted: tuple[list[Timed], EngineConfig],
) -> None:
    real, engine = fitted
    ticks: list[None] = []
    again = fit(real, UNKNOWN, range(20), lambda: ticks.append(None))
    assert again == engine.step_time
    assert len(ticks) <= len(ROUNDS) * (EVALUATIONS + 6)


def test_requests_that_are_not_scored_do_not_steer_the_fit(fitted: tuple[list[Timed], EngineConfig]) -> None:
    real, engine = fitted
    spoilt = [*real[:20], *(replace(t, first_token_s=t.first_token_s + 9, last_token_s=1e6) for t in real[20:])]
    assert fit(spoilt, UNKNOWN, range(20)) == engine.step_time


def later(t: Timed) -> Timed:
    return replace(t, first_token_s=t.first_token_s + 1, last_token_s=t.last_token_s + 1)


def slower(t: Timed) -> Timed:
    return replace(t, last_token_s=t.last_token_s + 1)


def test_equal_times_do_not_differ() -> None:
    real = served(5, TRUTH)
    assert mismatch(real, real, range(5)) == 0.0


@pytest.mark.parametrize("change", [later, slower])
def test_a_difference_counts_where_it_is_scored(change: Callable[[Timed], Timed]) -> None:
    real = served(5, TRUTH)
    changed = [*real[:4], change(real[4])]
    assert mismatch(real, changed, range(4)) == 0.0
    assert mismatch(real, changed, range(5)) > mismatch(real, changed, range(4))


def test_single_tokens_have_no_time_between_tokens_to_compare() -> None:
    real = [Timed(10, 1, 0.0, 0.0, 0.5, 0.5)]
    assert mismatch(real, [replace(real[0], first_token_s=1.0, last_token_s=1.0)], [0]) > 1.0
