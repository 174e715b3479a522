"""Runs of the overload benchmark: a window of a trace at a share of saturation, with the queue or without, and its figures.

Saturation is the highest load at which throughput follows what is offered. Offered is the rate at which requests come where nobody
waits, between `MEASURED` of them; throughput is the rate of complete answers in the same span of time, on the fleet with the same
router without a queue. It follows while it is at least `FOLLOWS` of what is offered. The load is found by bisection, between
shares of the rate of a fleet that is kept backlogged (`matrix/load.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Final

from extproc.core.types import End
from extproc.sim.cluster import Cluster, Scenario, Served
from extproc.sim.fleet_spec import Group
from extproc.sim.node import NodeSpec
from extproc.sim.report import percentile
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.simulate_report import TOO_MANY, Slo
from extproc.sim.traces import Generate, Trace, flooded, generate, prioritized
from extproc.sim.traces.marks import FLOODING, MODEST, URGENT
from tests.bench.matrix import windows
from tests.bench.matrix.cells import fleet
from tests.bench.matrix.load import Pace, pace, saturation_per_s
from tests.bench.matrix.windows import Source

POLICY: Final = "predicted"
GROUP: Final = Group(gpu="h100", count=4)
SIZE: Final = "8b"
SLO: Final = Slo(2.0, 0.025)
"""As in docs/benchmark-routing.md."""
DOCUMENTS: Final = Generate(
    turns=1, system_tokens=500, user_tokens=6000, user_sigma=0.8, output_tokens=100, burst_share=0, block_size=128
)
"""Long prompts that share little, short answers, nobody who waits for an answer: computing prompts is nearly all of the work."""

MEASURED: Final = (0.3, 0.9)
"""Shares of the requests between whose arrivals rates are taken: the fleet has come to speed, and still gets new ones."""
FOLLOWS: Final = 0.95
BRACKET: Final = (0.6, 1.4)
"""Of the backlogged fleet's rate."""
BISECTIONS: Final = 6
BACKLOG: Final = 600
"""Requests of the backlogged run, which only says where to look."""
WARM_UP: Final = 0.1
"""Share of the requests, the first to arrive, that are not scored."""
URGENT_SHARE: Final = 0.2
URGENCY: Final = {"urgent": True, "others": False}
FLOOD: Final = 5.0
"""What the one tenant sends over what the other does."""


class Case(StrEnum):
    """Who asks."""

    PRIORITY = "priority"  # a fifth of the sessions is urgent
    SLO = "slo"  # the same, and every client wants the SLO's TTFT or else a refusal
    FLOOD = "flood"  # two tenants, of which one sends five times what the other does


@dataclass(frozen=True, slots=True)
class Place:
    """A window on the fleet."""

    source: Source
    seed: int


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    place: Place
    case: Case
    load: float
    """Share of saturation."""
    queue: bool
    saturation_per_s: float


@dataclass(frozen=True, slots=True)
class Clients:
    """Requests of one kind as their clients saw them. Latencies are those of complete answers, infinite where there is none."""

    requests: int
    refused: int
    """With 429."""
    failed: int
    """Without a complete answer for any other reason."""
    held: int
    held_mean_s: float
    """Of those that were held; 0 of none."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    e2e_mean_s: float
    goodput: float
    """Share of the requests that were answered in full and in time."""
    ttft_met: float
    """Share of the requests that were answered in full and had their first token in time, however slowly the others came."""
    served_tokens_per_s: float
    """Prompt and output of the complete answers that ended while scored requests still arrived."""
    offered_tokens_per_s: float
    """The same of the requests that arrived meanwhile."""


# --- the load -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def window(place: Place) -> Trace:
    """Turns of which the first starts at 0. Raises TraceError."""
    if place.source.name == "documents":
        spec = DOCUMENTS.model_copy(update={"sessions": place.source.requests})
        return replace(generate(spec, place.seed), name="documents")
    return windows.window(place.source, place.seed)


def nodes(trace: Trace) -> tuple[NodeSpec, ...]:
    """The fleet."""
    return fleet([GROUP], SIZE, "hbm", trace.block_size)


def saturation(place: Place) -> float:
    """Requests a second beyond which throughput no longer follows. Raises LoadError, TraceError."""
    trace = window(place)
    backlogged_per_s = saturation_per_s(trace.limited(BACKLOG), nodes(trace), place.seed)
    paced = pace(trace, nodes(trace))
    low, high = (share * backlogged_per_s for share in BRACKET)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if follows(place, paced, middle) else (low, middle)
    return low


def follows(place: Place, paced: Pace, rate_per_s: float) -> bool:
    """Whether the fleet answers requests as fast as they come at that rate."""
    speed_up = paced.speed_up(rate_per_s)
    begin_s, end_s = (paced.moment(share, speed_up) for share in MEASURED)
    trace = window(place)
    served = serve(Scenario(trace.faster(speed_up), nodes(trace), wiring=Wiring(queue=NO_QUEUE), seed=place.seed))
    answered = sum(s.end is End.OK and begin_s < _ended_s(s) <= end_s for s in served)
    came = sum(begin_s < at <= end_s for at in paced.arrivals(speed_up))
    return answered >= FOLLOWS * came


def _ended_s(served: Served) -> float:
    return served.arrived_s + served.e2e_s


# --- runs ---------------------------------------------------------------------------------------------------------------


def run(job: Job) -> dict[str, Clients]:
    """Figures of all clients and of each kind of them. Raises LoadError, TraceError."""
    try:
        replayed = scenario(job)
        return dict(kinds(job.case, serve(replayed), replayed.trace))
    except Exception as e:
        e.add_note(f"in {job}")
        raise


def scenario(job: Job) -> Scenario:
    """What is replayed."""
    trace, seed = window(job.place), job.place.seed
    faster = trace.faster(pace(trace, nodes(trace)).speed_up(job.load * job.saturation_per_s))
    marked = flooded(faster, FLOOD, seed) if job.case is Case.FLOOD else prioritized(faster, URGENT_SHARE, seed)
    return Scenario(
        marked,
        nodes(trace),
        wiring=Wiring() if job.queue else Wiring(queue=NO_QUEUE),
        slo_ttft_s=SLO.ttft_s if job.case is Case.SLO else None,
        seed=seed,
    )


def serve(given: Scenario) -> Sequence[Served]:
    """Every request, in the order of their ends."""
    return Cluster(given, POLICY).run().served


def kinds(case: Case, served: Sequence[Served], trace: Trace) -> Iterator[tuple[str, Clients]]:
    """What came of the scored requests: of all, and of each of the two kinds that the case tells apart."""
    scored = sorted(served, key=lambda s: s.arrived_s)[int(WARM_UP * len(served)) :]
    yield "all", clients(scored, trace)
    if case is Case.FLOOD:
        parts = {name: [s for s in scored if s.tenant == name] for name in (MODEST, FLOODING)}
    else:
        parts = {name: [s for s in scored if (s.priority == URGENT) is urgent] for name, urgent in URGENCY.items()}
    until_s = scored[-1].arrived_s
    for name, part in parts.items():
        yield name, clients(part, trace, (scored[0].arrived_s, until_s))


def clients(part: Sequence[Served], trace: Trace, span: tuple[float, float] | None = None) -> Clients:
    """What came of these, in the order of their arrivals. `span`: when the first and the last scored request arrived, seconds."""
    begin_s, end_s = span or (part[0].arrived_s, part[-1].arrived_s)
    good = [s for s in part if s.end is End.OK]
    ttfts = sorted(s.ttft_s for s in good if s.ttft_s is not None)
    held = [s.held_s for s in part if s.held_s is not None]
    refused = sum(s.status == TOO_MANY for s in part)
    return Clients(
        requests=len(part),
        refused=refused,
        failed=len(part) - len(good) - refused,
        held=len(held),
        held_mean_s=_mean(held, 0.0),
        ttft_mean_s=_mean(ttfts),
        ttft_p50_s=_percentile(ttfts, 50),
        ttft_p99_s=_percentile(ttfts, 99),
        e2e_mean_s=_mean([s.e2e_s for s in good]),
        goodput=sum(map(SLO.met, part)) / len(part),
        ttft_met=sum(ttft <= SLO.ttft_s for ttft in ttfts) / len(part),
        served_tokens_per_s=sum(_tokens(s, trace) for s in good if _ended_s(s) <= end_s) / (end_s - begin_s),
        offered_tokens_per_s=sum(_tokens(s, trace) for s in part) / (end_s - begin_s),
    )


def _tokens(served: Served, trace: Trace) -> int:
    """What was asked for, whatever came."""
    turn = trace.turns[served.turn]
    return turn.prompt_tokens + turn.output_tokens


def _mean(values: Sequence[float], of_none: float = math.inf) -> float:
    return sum(values) / len(values) if values else of_none


def _percentile(ordered: Sequence[float], percent: float) -> float:
    found = percentile(ordered, percent)
    return math.inf if found is None else found


# --- fairness -----------------------------------------------------------------------------------------------------------


def max_min(demands: Sequence[float], capacity: float) -> list[float]:
    """Shares of a capacity, in the unit of the demands: nobody gets more than asked for, and what one leaves goes to the others alike."""
    shares, left = [0.0] * len(demands), capacity
    for place, rank in enumerate(sorted(range(len(demands)), key=demands.__getitem__)):
        shares[rank] = min(demands[rank], left / (len(demands) - place))
        left -= shares[rank]
    return shares


def jain(values: Sequence[float]) -> float:
    """Jain's index (Jain, Chiu, Hawe 1984): 1 where all are equal, 1/n where one has everything; 1 where nobody has anything."""
    squares = len(values) * sum(v * v for v in values)
    return sum(values) ** 2 / squares if squares else 1.0


def fairness(found: Iterable[Clients]) -> float:
    """Jain's index of what tenants were served, each over its max-min fair share of all that was served."""
    every = list(found)
    served = [each.served_tokens_per_s for each in every]
    shares = max_min([each.offered_tokens_per_s for each in every], sum(served))
    return jain([got / share for got, share in zip(served, shares, strict=True) if share])
