"""The upper bound of a cell: an assignment found with all of the future known (`tests.bench.hindsight`), for mean TTFT alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from extproc.core.types import End
from extproc.sim.cluster import Scenario, Served
from tests.bench.hindsight import Bound, hindsight
from tests.bench.hindsight_greedy import exact_greedy


def clairvoyant(
    scenario: Scenario, runs: Sequence[Sequence[Served]], scored: Collection[int], evaluations: int
) -> list[Served]:
    """The requests of the scenario, searched for from the assignments of these runs and from one greedy by exact knowledge."""
    starts = [*map(_assignment, runs), exact_greedy(scenario)]
    return _served(scenario, hindsight(scenario, starts, evaluations, scenario.seed, scored=scored))


def _assignment(run: Sequence[Served]) -> list[str]:
    return [served.replica or "" for served in sorted(run, key=_place)]


def _place(served: Served) -> int:
    return served.turn


def _served(scenario: Scenario, bound: Bound) -> list[Served]:
    times = zip(bound.assignment, bound.ttft_s, bound.e2e_s, bound.cached_tokens, strict=True)
    return [
        Served(
            turn=number,
            arrived_s=turn.delay_s,
            router=0,
            replica=replica,
            attempts=1,
            end=End.OK,
            status=200,
            reason="hindsight",
            queue_s=None,
            ttft_s=ttft_s,
            e2e_s=e2e_s,
            prompt_tokens=turn.prompt_tokens,
            output_tokens=turn.output_tokens,
            cached_tokens=cached_tokens,
            predicted_cached_tokens=None,
            predicted_ttft_s=None,
        )
        for number, (turn, (replica, ttft_s, e2e_s, cached_tokens)) in enumerate(
            zip(scenario.trace.turns, times, strict=True)
        )
    ]
