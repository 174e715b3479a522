"""How much a fleet can take, and how fast a window must be replayed for a share of that.

Saturation is the throughput of a fleet that is kept backlogged: the requests of the window arrive within one second, in their
order and without waiting for the answers before; 90 % of them over the time until 90 % have ended is the rate. (From the start
on, not from the first ends: in a window of short requests all prompts are computed before the first answer ends, and what
follows is the rate of decoding alone.) The router is `least_prefill`. Each kind of replica is measured in an equal fleet of
eight, and a mixed fleet takes the sum, so no policy decides what full load is.

Load is the rate at which requests come where nobody waits, between the first and the last tenth of them, over saturation. The
speed-up is what makes it so. It divides the times at which sessions begin; pauses after an answer stay. So a window of sessions
is replayed a little faster than one of single requests, to make up for the time in which the first of them come to speed. Sessions
that wait for their answers ask less: beyond saturation a closed loop slows down with the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from extproc.core.types import End
from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.fleet_spec import Group
from extproc.sim.node import NodeSpec
from extproc.sim.traces import Trace
from tests.bench.baselines import installed
from tests.bench.matrix.cells import FLEETS, SIZES, STATES, Cell, fleet
from tests.bench.matrix.nominal import nominal
from tests.bench.matrix.windows import Source, window

ROUTER: Final = "least_prefill"
REPLICAS: Final = 8
"""Of one kind, to measure it."""
SPAN_S: Final = 1.0
"""In which all requests come that keep a fleet backlogged: faster than any can work."""
_SPEED_UPS: Final = (1e-4, 1e6)


class LoadError(Exception):
    """The window cannot be replayed at that load; the text says why."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicas alike: what is measured for the saturation of every fleet that has some."""

    source: Source
    seed: int
    group: str
    """As `--replica` takes it, without a count."""
    size: str
    cache: str


def kinds(cell: Cell, source: Source, seed: int) -> list[tuple[Kind, int]]:
    """Those of the cell's fleet, and how many replicas there are of each."""
    size = SIZES[cell.fleet]
    return [(Kind(source, seed, f"gpu={g.gpu},tp={g.tp}", size, cell.cache), g.count) for g in FLEETS[cell.fleet]]


def replica_rate_per_s(kind: Kind) -> float:
    """Requests a second of one such replica at saturation."""
    trace = window(kind.source, kind.seed)
    group = Group.from_text(f"{kind.group},count={REPLICAS}")
    return saturation_per_s(trace, fleet([group], kind.size, kind.cache, trace.block_size), kind.seed) / REPLICAS


def saturation_per_s(trace: Trace, nodes: tuple[NodeSpec, ...], seed: int) -> float:
    """Requests a second of a fleet that is kept backlogged."""
    times = [n.at_s for n in nominal(trace, nodes)]
    scale = SPAN_S / (max(times) or 1.0)
    turns = tuple(replace(t, after=None, delay_s=at * scale) for t, at in zip(trace.turns, times, strict=True))
    scenario = Scenario(replace(trace, turns=turns), nodes, wiring=STATES["exact"], seed=seed)
    with installed():
        served = Cluster(scenario, ROUTER).run().served
    ends = sorted(s.arrived_s + s.e2e_s for s in served if s.end is End.OK)
    most = max(math.ceil(0.9 * len(ends)), 1)
    return most / ends[most - 1]


@dataclass(frozen=True, slots=True)
class Pace:
    """When the requests of a window come where nobody waits, at any speed-up."""

    starts: tuple[float, ...]
    """For each request, seconds from the beginning of the window to that of its session."""
    offsets: tuple[float, ...]
    """And on to the request itself: answers and pauses."""

    def arrivals(self, speed_up: float) -> list[float]:
        """For each request."""
        return [start / speed_up + offset for start, offset in zip(self.starts, self.offsets, strict=True)]

    def moment(self, share: float, speed_up: float) -> float:
        """When that share of the requests has come, seconds."""
        ordered = sorted(self.arrivals(speed_up))
        return ordered[round(share * (len(ordered) - 1))]

    def rate_per_s(self, speed_up: float) -> float:
        """Between the first and the last tenth of the requests."""
        took_s = self.moment(0.9, speed_up) - self.moment(0.1, speed_up)
        return 0.8 * len(self.starts) / took_s if took_s > 0 else math.inf

    def speed_up(self, rate_per_s: float) -> float:
        """What brings requests at that rate. Raises LoadError where pauses do not allow it."""
        low, high = _SPEED_UPS
        if self.rate_per_s(high) < rate_per_s:
            raise LoadError(f"{len(self.starts)} requests in sessions never come at {rate_per_s:.1f} a second")
        while high > low * 1.0001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.rate_per_s(middle) < rate_per_s else (low, middle)
        return high


def pace(trace: Trace, nodes: tuple[NodeSpec, ...]) -> Pace:
    """Of a window on a fleet, whose speed decides how long answers take."""
    times = [n.at_s for n in nominal(trace, nodes)]
    starts: list[float] = []
    for turn in trace.turns:
        starts.append(turn.delay_s if turn.after is None else starts[turn.after])
    return Pace(tuple(starts), tuple(at - start for at, start in zip(times, starts, strict=True)))


def total_rate_per_s(rates: Sequence[tuple[float, int]]) -> float:
    """Of a fleet, from the rate of one replica of each kind and their number."""
    return sum(rate * count for rate, count in rates)
