from __future__ import annotations

import pytest

from extproc.core.steptime import StepTime
from extproc.sim.engine import EngineConfig
from extproc.sim.replay import Timed, replay

SECOND = EngineConfig(StepTime(1.0, 0, 0, 0, 0, 0), cpu_overhead_s=0.0, block_size=4, num_blocks=12)
"""Each step takes one."""


def coming(at_s: float, prompt: int = 8, output: int = 3) -> Timed:
    return Timed(prompt, output, at_s, 0.0, 0.0, 0.0)


def test_times_are_those_of_the_engine_and_places_those_of_the_input() -> None:
    later, sooner = replay([coming(10.5), coming(10.0)], SECOND)
    # alone at 10; the second comes during the first step, is seen at 11 and waits for the step decided before
    assert (sooner.scheduled_s, sooner.first_token_s, sooner.last_token_s) == (10.0, 11.0, 13.0)
    assert (later.scheduled_s, later.first_token_s, later.last_token_s) == (11.0, 13.0, 15.0)
    assert (later.queue_s, later.ttft_s, later.tpot_s) == (0.5, 2.5, 1.0)


def test_an_idle_engine_waits_for_the_next_request() -> None:
    times = replay([coming(-5.0), coming(100.0)], SECOND)
    assert [t.first_token_s for t in times] == [-4.0, 101.0]


def test_a_single_token_has_no_time_per_token() -> None:
    assert replay([coming(0.0, output=1)], SECOND)[0].tpot_s is None


def test_queueing_ends_with_the_first_admission_though_a_preemption_brings_another() -> None:
    first, second = replay([coming(0.0, output=30), coming(0.0, output=30)], SECOND)
    assert second.scheduled_s == 0.0
    assert second.first_token_s == 1.0
    assert second.last_token_s > first.last_token_s == 30.0


def test_what_could_never_run_is_refused_by_its_place() -> None:
    with pytest.raises(ValueError, match="request 1 could never run: too_long"):
        replay([coming(0.0), coming(0.0, prompt=60)], SECOND)
