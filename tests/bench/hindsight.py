"""How well any router could do on a trace whose arrival times are fixed: an assignment found with all of the future known.

A greedy choice with exact knowledge of the present (`hindsight_greedy.py`) is no such bound: this ends 3 to 7 % below it. It
is a search over whole assignments, by simulated annealing (Kirkpatrick, Gelatt and Vecchi, 1983), from the best of those given:
 1. draw a proposal: a request to another replica, two requests against each other, or a family of requests that share a
    prefix, most often such as wait long for their first token or compute again what another replica has in its cache
    (`hindsight_moves.py`);
 2. simulate the two replicas concerned again, from a checkpoint before the first change, with the true output lengths, and
    drop the proposal as soon as, some seconds after the change, the waiting that it has added exceeds the limit;
 3. otherwise simulate them to the end, and accept where the objective falls, or rises by less than an exponential variate
    of the present temperature. The temperature falls linearly, to zero after nine tenths of the evaluations.

What comes out is feasible: what one all-knowing router reaches with real queues and real caches. The optimum is at least as
good, so it bounds what routers can do only as far as the search goes; `Bound.curve` tells whether it was still falling. From
the other side, nobody is below `unloaded_ttft_s`; the optimum lies between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from extproc.sim.cluster import Scenario
from extproc.sim.engine import EngineConfig
from tests.bench.hindsight_fleet import Placement, Problem
from tests.bench.hindsight_greedy import exact_greedy
from tests.bench.hindsight_moves import SHARES, Kinship, Proposer

EVALUATIONS: Final = 150_000
"""Re-simulations of one replica; about three minutes for 1,500 requests on 8 replicas."""
WARMTH: Final = 0.4
"""First temperature, in means of the objective of a request at the start.

For 100 evaluations a request; with 0.15 the search ends 0.7 % higher, but is ahead over the first four fifths of the way.
"""
COLD: Final = 0.9
"""Share of the evaluations after which only improvements are accepted."""
ROUNDING_S: Final = 1e-9
"""A smaller gain is none: it may be that of a sum taken in another order."""
POINTS: Final = 20
"""Of the curve."""


@dataclass(slots=True)
class Bound:
    """The best assignment found, by turn, and what comes of it."""

    assignment: list[str]
    """Addresses."""
    ttft_s: list[float]
    e2e_s: list[float]
    cached_tokens: list[int]
    evaluations: int
    improved_by: dict[str, float]
    """Kind of proposal -> seconds by which those accepted have lowered the objective, less those by which they raised it."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(evaluations, least objective so far in seconds for each scored request)"""

    def __repr__(self) -> str:
        mean_s = math.fsum(self.ttft_s) / max(len(self.ttft_s), 1)
        return f"<bound {mean_s:.3f} s mean TTFT after {self.evaluations:,} evaluations>"


def hindsight(
    scenario: Scenario,
    starts: Sequence[Sequence[str]] = (),
    max_evaluations: int = EVALUATIONS,
    seed: int = 1,
    *,
    scored: Collection[int] | None = None,
    e2e_weight: float = 0.0,
    warmth: float = WARMTH,
    progress: Callable[[int, float], object] | None = None,
) -> Bound:
    """Search for the assignment with the least sum of TTFT + `e2e_weight` * E2E over the turns `scored` (None: all).

    `starts`: assignments to begin with, an address for each turn; without any, the one of `exact_greedy`. Equal arguments
    give equal results: no clock decides. Where evaluations are few, less `warmth` is better; 0 is plain descent. `progress` is told now and then the evaluations and the mean objective, seconds.
    Routers, wiring and incidents are not part of it: only the trace and the fleet count. Raises ValueError for a trace with
    turns that wait for others, a scenario with incidents, an address that is not in the fleet, or a request that a replica
    would refuse.
    """
    problem = Problem.of(scenario, scored, e2e_weight)
    placements = [Placement(problem, problem.places(start)) for start in starts or [exact_greedy(scenario)]]
    search = _Search(min(placements, key=lambda p: p.objective_s), max_evaluations, warmth, Random(seed))
    del placements  # each keeps hundreds of copies of engines
    search.run(progress)
    return search.bound()


def unloaded_ttft_s(scenario: Scenario) -> list[float]:
    """By turn, what no assignment can go below: alone on the fastest replica, with all cached that was ever there before.

    Seconds; closed form of the steps of the prefill. Raises ValueError as `hindsight`.
    """
    problem = Problem.of(scenario)
    shared = Kinship.of(problem).shared
    floor_s = [0.0] * len(problem.turns)
    for turn, arrival, cached in zip(problem.turns, problem.arrivals, shared, strict=True):
        uncached = arrival.request.prompt_tokens - cached
        floor_s[turn] = min(_prefill_s(config, uncached, cached) for config in problem.configs)
    return floor_s


def _prefill_s(config: EngineConfig, uncached: int, cached: int) -> float:
    budget = config.max_num_batched_tokens
    return config.step_time.prefill_s(uncached, cached, budget) + -(-uncached // budget) * config.cpu_overhead_s


class _Search:
    def __init__(self, placement: Placement, max_evaluations: int, warmth: float, rng: Random) -> None:
        self._placement, self._max, self._rng = placement, max_evaluations, rng
        self._requests = max(math.fsum(placement.problem.weights), 1.0)
        self._warmest_s = warmth * placement.objective_s / self._requests
        self._least_s, self._best = placement.objective_s, placement.places.copy()
        self._changed_s = dict.fromkeys(SHARES, 0.0)
        self._curve: list[tuple[int, float]] = []

    def run(self, progress: Callable[[int, float], object] | None) -> None:
        placement = self._placement
        self._note(progress)
        if len(placement.queues) < 2 or not placement.places:
            return
        proposer = Proposer(placement, self._rng)
        while placement.evaluations < self._max:
            proposal = proposer.draw()
            change_s = placement.attempt(proposal.moves, self._limit_s(), proposal.horizons_s)
            if change_s is not None:
                self._changed_s[proposal.kind] += change_s
                self._remember()
                proposer.look()
            if placement.evaluations >= self._max * len(self._curve) / POINTS:
                self._note(progress)

    def _limit_s(self) -> float:
        """A change below this is accepted."""
        cooling = 1.0 - self._placement.evaluations / (COLD * self._max)
        temperature_s = self._warmest_s * max(cooling, 0.0)
        return temperature_s * self._rng.expovariate(1.0) - ROUNDING_S

    def _remember(self) -> None:
        if self._placement.objective_s < self._least_s:
            self._least_s, self._best = self._placement.objective_s, self._placement.places.copy()

    def _note(self, progress: Callable[[int, float], object] | None) -> None:
        point = self._placement.evaluations, self._least_s / self._requests
        self._curve.append(point)
        if progress is not None:
            progress(*point)

    def bound(self) -> Bound:
        problem = self._placement.problem
        best = Placement(problem, self._best)
        ranks = sorted(range(len(problem.turns)), key=problem.turns.__getitem__)
        at_s = [arrival.at_s for arrival in problem.arrivals]
        return Bound(
            [problem.addresses[best.places[rank]] for rank in ranks],
            [best.first_s[rank] - at_s[rank] for rank in ranks],
            [best.last_s[rank] - at_s[rank] for rank in ranks],
            [best.cached[rank] for rank in ranks],
            self._placement.evaluations,
            {kind: -change_s for kind, change_s in self._changed_s.items()},
            self._curve,
        )
