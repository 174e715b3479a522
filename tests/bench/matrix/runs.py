"""One run: a window at a load on a fleet under one policy, and its figures. Everything here can be sent to another process."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from extproc.core.types import End
from extproc.sim.cluster import Cluster, Scenario, Served
from extproc.sim.incidents import checked
from extproc.sim.report import percentile
from extproc.sim.simulate_report import Slo
from tests.bench.baselines import BASELINES, installed
from tests.bench.matrix.cells import FLEETS, SIZES, SLOS, STATES, Cell, fleet, incidents
from tests.bench.matrix.clairvoyant import clairvoyant
from tests.bench.matrix.load import LoadError, Pace, pace
from tests.bench.matrix.nominal import nominal
from tests.bench.matrix.windows import Source, window

OURS: Final = "predicted"
CLAIRVOYANT: Final = "clairvoyant"
"""No policy: an assignment found by one who knows everything beforehand."""
POLICIES: Final = (OURS, *BASELINES)
WARM_UP: Final = 0.1
"""Share of the requests, the first to come where nobody waits, that are replayed and not scored."""
CLAIRVOYANT_LOAD: Final = 0.9
"""The highest load at which the bound is looked for."""
_SEARCHED_FROM: Final = (OURS, "least_prefill")


@dataclass(frozen=True, slots=True)
class Job:
    """One run, or with `policy` None the floor of what all runs of the cell share."""

    cell: Cell
    source: Source
    seed: int
    policy: str | None
    saturation_per_s: float
    evaluations: int = 0
    """Of the search for the bound."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests that are scored. Latencies are those of complete answers, infinite where there is none."""

    ttft_mean_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    goodput: float
    """Share of all requests, failed ones included, that were answered in full and in time."""
    hit: float
    """Share of the prompt tokens of complete answers that were in the replica's cache."""
    errors: int
    """Requests without a complete answer."""
    requests: int


@dataclass(frozen=True, slots=True)
class Replay:
    """What all policies of a cell and a seed share."""

    scenario: Scenario
    order: tuple[int, ...]
    """Places of the turns, as they come where nobody waits."""

    @property
    def scored(self) -> frozenset[int]:
        """Places of the turns that count: all but the first tenth to come."""
        return self.after(int(WARM_UP * len(self.order)))

    def after(self, requests: int) -> frozenset[int]:
        """Places of the turns that come after so many."""
        return frozenset(self.order[requests:])

    @property
    def open_loop(self) -> bool:
        """No request waits for an answer."""
        return all(turn.after is None for turn in self.scenario.trace.turns)


@lru_cache(maxsize=2)
def replay(job: Job) -> Replay:
    """The window of a job at its load, whatever its policy. Raises LoadError."""
    cell, trace = job.cell, window(job.source, job.seed)
    nodes = fleet(FLEETS[cell.fleet], SIZES[cell.fleet], cell.cache, trace.block_size)
    paced = pace(trace, nodes)
    try:
        speed_up = paced.speed_up(cell.load * job.saturation_per_s)
    except LoadError as e:
        raise LoadError(f"{cell}: {e}; take a larger window") from None
    moments = (paced.moment(0.3, speed_up), paced.moment(0.6, speed_up))
    scenario = Scenario(
        trace.faster(speed_up),
        nodes,
        routers=cell.routers,
        wiring=STATES[cell.state],
        incidents=checked(incidents(cell.fault, job.seed % len(nodes) + 1, *moments), len(nodes)),
        seed=job.seed,
    )
    return Replay(scenario, _order(paced, speed_up))


def _order(paced: Pace, speed_up: float) -> tuple[int, ...]:
    arrivals = paced.arrivals(speed_up)
    return tuple(sorted(range(len(arrivals)), key=lambda number: (arrivals[number], number)))


def run(job: Job) -> Figures | float | None:
    """The figures of a policy; the mean floor in seconds where the job names none; None where the bound does not apply."""
    try:
        shared = replay(replace(job, policy=None))  # made once for all policies
        if job.policy is None:
            return floor_s(shared)
        served = serve(shared.scenario, job.policy) if job.policy != CLAIRVOYANT else _bound(shared, job.evaluations)
    except Exception as e:
        e.add_note(f"in {job.cell}, seed {job.seed}, {job.policy}")
        raise
    return None if served is None else figures(served, shared.scored, SLOS[SIZES[job.cell.fleet]])


def serve(scenario: Scenario, policy: str) -> Sequence[Served]:
    """Every request of the scenario under that policy, a baseline too."""
    with installed():
        return Cluster(scenario, policy).run().served


def _bound(shared: Replay, evaluations: int) -> Sequence[Served] | None:
    if not shared.open_loop:
        return None
    runs = [serve(shared.scenario, policy) for policy in _SEARCHED_FROM]
    return clairvoyant(shared.scenario, runs, shared.scored, evaluations)


def floor_s(shared: Replay) -> float:
    """Mean over what is scored of the prefill that no router can avoid."""
    every = nominal(shared.scenario.trace, shared.scenario.fleet)
    return _mean(every[number].floor_s for number in shared.scored)


def figures(served: Iterable[Served], scored: Collection[int], slo: Slo) -> Figures:
    """Of the scored ones among what was served."""
    counted = [s for s in served if s.turn in scored]
    good = [s for s in counted if s.end is End.OK]
    ttfts = sorted(s.ttft_s for s in good if s.ttft_s is not None)
    p99 = percentile(ttfts, 99)
    prompts = sum(s.prompt_tokens for s in good)
    return Figures(
        ttft_mean_s=_mean(ttfts),
        ttft_p99_s=math.inf if p99 is None else p99,
        e2e_mean_s=_mean(s.e2e_s for s in good),
        goodput=sum(map(slo.met, counted)) / len(counted),
        hit=sum(s.cached_tokens or 0 for s in good) / prompts if prompts else 0.0,
        errors=len(counted) - len(good),
        requests=len(counted),
    )


def bounded(cell: Cell) -> bool:
    """Whether the clairvoyant bound is looked for: all but the load as usual, for it takes long. It also wants requests by the clock."""
    return cell == Cell(cell.trace, cell.load) and cell.load <= CLAIRVOYANT_LOAD


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else math.inf
