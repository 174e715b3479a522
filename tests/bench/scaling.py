"""What the scaling signal saves: a day with a peak on a fleet that grows and shrinks, against the usual signals.

The day is pressed into `DAY_S`; nothing else is: a replica takes 120 s to start, cooldowns and windows are as configured. So the
ramps are 12 times as steep as those of a day of 24 hours, which is harder for all.

Everybody gets the same router, replicas, traffic and bounds, is asked every 15 s, and pays for a replica from the moment at which
it is asked for until it has drained. The rivals:
 * `queue`: KEDA's trigger on waiting requests, those that the router holds included, through an HPA:
   ceil(waiting / threshold). Threshold 10.
 * `gpu`: an HPA on GPU use, the share of time with a step running: ceil(replicas x use / target). Target 75 %.
 * `fixed`: so many replicas all day.
The HPA is autoscaling/v2 as Kubernetes documents it: tolerance 10 %, up 2 pods a minute after 30 s, down 1 pod a minute after 300 s.
Each rival is run with other thresholds and least numbers of replicas too, and is judged by its cheapest setting that serves as many
requests in time as we do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final

from extproc.core.scaling.settings import ScalingSettings
from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.elastic import Control, Scaling, Sight
from extproc.sim.fleet_spec import Group
from extproc.sim.fleet_spec import nodes as fleet
from extproc.sim.sidecar import POOL, Wiring
from extproc.sim.traces import Trace, Turn, load
from tests.bench.matrix.summary import geomean
from tests.bench.routing import Mapper, in_process, tuned

OUTPUT: Final = Path("build/bench-scaling.json")
DAY_S: Final = 7200.0
SEEDS: Final = (1, 2, 3)
TTFT_S: Final = 1.5
"""The target."""
COLD_START_S: Final = 120.0
MAX_REPLICAS: Final = 12
INITIAL: Final = 2
LOW_PER_S: Final = 3.0
PEAK_PER_S: Final = 20.0
GROUP: Final = Group(gpu="a100")
SIZE: Final = "8b"
BLOCK: Final = 64
EQUAL: Final = 0.002
"""An attainment that falls short by no more than this share of all requests counts as equal."""
PROMPT: Final = (2500, 0.7)
OUTPUT_LENGTH: Final = (150, 0.7)
"""Median and sigma of log-normal lengths, tokens."""
SYSTEM_TOKENS: Final = 1024
TENANTS: Final = 20
OURS: Final = ScalingSettings(
    max_replicas=MAX_REPLICAS, ttft_target_s=TTFT_S, tpot_target_s=0.1, cold_start_s=COLD_START_S
)


# --- the day ------------------------------------------------------------------------------------------------------------


def two_peaks(share_of_day: float) -> float:
    """A night, a steep morning, a peak before noon, a lower one in the afternoon, a slow evening. As all of them: 0 to 1."""
    morning = math.exp(-(((share_of_day - 0.45) / 0.09) ** 2))
    afternoon = 0.8 * math.exp(-(((share_of_day - 0.64) / 0.13) ** 2))
    return min(max(morning, afternoon) + 0.15 * min(morning, afternoon), 1.0)


def office(share_of_day: float) -> float:
    """Up at once in the morning, down at once in the evening, less at noon."""
    begun = 1.0 / (1.0 + math.exp((0.25 - share_of_day) / 0.02))
    over = 1.0 / (1.0 + math.exp((0.75 - share_of_day) / 0.02))
    return begun * (1.0 - over) * (1.0 - 0.35 * math.exp(-(((share_of_day - 0.5) / 0.04) ** 2)))


def waves(share_of_day: float) -> float:
    """Four peaks, each as high."""
    return 0.41 - 0.41 * math.cos(8.0 * math.pi * share_of_day)


def flat(_: float) -> float:
    """The same all day."""
    return 0.41


SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    "two_peaks": two_peaks,
    "office": office,
    "waves": waves,
    "flat": flat,
}


def rate_per_s(share_of_day: float, shape: str = "two_peaks") -> float:
    """Requests a second."""
    return LOW_PER_S + (PEAK_PER_S - LOW_PER_S) * SHAPES[shape](share_of_day)


@lru_cache(maxsize=1)
def day(seed: int, shape: str = "two_peaks") -> Trace:
    """Requests of one day, none of which waits for another. Over some minutes chance moves the rate by a tenth."""
    rng = Random(f"{seed}/day")
    swings = [rng.lognormvariate(0.0, 0.1) for _ in range(int(DAY_S // 120) + 1)]
    turns: list[Turn] = []
    at, most = 0.0, 1.5 * PEAK_PER_S
    while (at := at + rng.expovariate(most)) < DAY_S:
        if rng.random() * most < rate_per_s(at / DAY_S, shape) * swings[int(at // 120)]:
            turns.append(_turn(rng, at, len(turns)))
    return Trace("day", BLOCK, tuple(turns))


def _turn(rng: Random, at: float, number: int) -> Turn:
    """A prompt behind one of some system prompts, which all replicas soon have."""
    tenant = rng.randrange(TENANTS)
    own, output = _length(rng, *PROMPT), _length(rng, *OUTPUT_LENGTH)
    shared = SYSTEM_TOKENS // BLOCK
    runs = ((tenant << 20, shared), ((number + TENANTS) << 20, (own + output) // BLOCK))
    return Turn(SYSTEM_TOKENS + own, output, at, None, runs, None, f"t{tenant}")


def _length(rng: Random, median: int, sigma: float) -> int:
    return max(1, min(round(rng.lognormvariate(math.log(median), sigma)), 8 * median))


# --- who decides --------------------------------------------------------------------------------------------------------


class Hpa:
    """Recommendations to numbers of pods, by autoscaling/v2 with the behaviours of the field."""

    UP_WINDOW_S, DOWN_WINDOW_S, PERIOD_S = 30.0, 300.0, 60.0
    UP_PODS, DOWN_PODS = 2, 1
    TOLERANCE = 0.1

    def __init__(self, least: int) -> None:
        self._least = least
        self._recommended: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def take(self, recommended: int, current: int, now: float) -> int:
        """Pods from now on."""
        recommended = min(max(recommended, self._least), MAX_REPLICAS)
        self._recommended = [(at, n) for at, n in self._recommended if at > now - self.DOWN_WINDOW_S]
        self._recommended.append((now, recommended))
        up = min(n for at, n in self._recommended if at > now - self.UP_WINDOW_S)
        down = max(n for _, n in self._recommended)
        wanted = min(max(current, up), down)
        self._changes = [(at, n) for at, n in self._changes if at > now - self.PERIOD_S]
        added = sum(n for _, n in self._changes if n > 0)
        removed = -sum(n for _, n in self._changes if n < 0)
        wanted = min(wanted, max(current - added + self.UP_PODS, current))
        wanted = max(wanted, min(current + removed - self.DOWN_PODS, current))
        if wanted != current:
            self._changes.append((now, wanted - current))
        return wanted


def by_queue(threshold: float, least: int) -> Control:
    """An external metric with a target of type AverageValue: within the tolerance nothing changes."""
    hpa = Hpa(least)

    def control(sight: Sight) -> int:
        ratio = sight.queue / (threshold * max(sight.asked, 1))
        steady = abs(ratio - 1.0) <= Hpa.TOLERANCE
        return hpa.take(sight.asked if steady else math.ceil(sight.queue / threshold), sight.asked, sight.now)

    return control


def by_gpu(target: float, least: int) -> Control:
    """A pod metric with an average as its target. On the way up pods that start count as idle."""
    hpa = Hpa(least)

    def recommended(sight: Sight) -> int:
        if sight.gpu is None:
            return sight.asked
        ratio = sight.gpu / target
        if ratio > 1.0 and sight.ready < sight.asked:
            ratio *= sight.ready / sight.asked
            return sight.asked if ratio <= 1.0 + Hpa.TOLERANCE else math.ceil(ratio * sight.asked)
        return sight.asked if abs(ratio - 1.0) <= Hpa.TOLERANCE else math.ceil(ratio * sight.ready)

    return lambda sight: hpa.take(recommended(sight), sight.asked, sight.now)


def ours() -> Control:
    """What the router says."""

    def control(sight: Sight) -> int:
        scaling = sight.router.pools[POOL].scaling
        assert scaling is not None
        return sight.asked if scaling.asked is None else scaling.asked

    return control


def fixed(replicas: int) -> Control:
    return lambda _: replicas


@dataclass(frozen=True, slots=True)
class Case:
    """Who decides, with what settings."""

    name: str
    threshold: float = 0.0
    least: int = 1

    @property
    def control(self) -> Callable[[], Control]:
        """Makes the one of a run."""
        match self.name:
            case "queue":
                return partial(by_queue, self.threshold, self.least)
            case "gpu":
                return partial(by_gpu, self.threshold, self.least)
            case "fixed":
                return partial(fixed, self.least)
            case _:
                return ours


QUEUE: Final = Case("queue", 10.0)
GPU: Final = Case("gpu", 0.75)
WORK: Final = Case("work")
SWEEP: Final = (
    *(Case("queue", t, n) for t, n in ((10.0, 1), (3.0, 1), (1.0, 1), (1.0, 4), (1.0, 6), (1.0, 7), (1.0, 8))),
    *(Case("gpu", t) for t in (0.75, 0.9)),
    *(Case("fixed", least=n) for n in (7, 8)),
)


# --- runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One day as one case."""

    case: Case
    seed: int
    requests: int
    attainment: float
    """Share of the requests whose first token came in time; refused ones did not get any."""
    ttft_p95_s: float
    tpot_p95_s: float
    replica_hours: float
    events: int
    """Changes of the number of replicas."""
    most: int
    """Replicas at one time."""


def run_case(job: tuple[Case, int], made: Callable[[int], Trace] = day) -> Row:
    """One run. `made`: the requests, of a seed."""
    case, seed = job
    trace = made(seed)
    scenario = Scenario(
        trace,
        fleet([GROUP.model_copy(update={"count": MAX_REPLICAS + 6})], SIZE, trace.block_size, 0.002),
        wiring=Wiring(scaling=OURS if case.name == "work" else None),
        scaling=Scaling(case.control, case.least if case.name == "fixed" else INITIAL, COLD_START_S),
        seed=seed,
    )
    result = Cluster(scenario, "predicted").run()
    elastic = result.elastic
    assert elastic is not None
    ttfts = sorted(s.ttft_s if s.ttft_s is not None and s.status == 200 else math.inf for s in result.served)
    tpots = sorted(
        (s.e2e_s - s.ttft_s) / (s.output_tokens - 1)
        for s in result.served
        if s.ttft_s is not None and s.output_tokens > 20
    )
    return Row(
        case=case,
        seed=seed,
        requests=len(ttfts),
        attainment=sum(t <= TTFT_S for t in ttfts) / len(ttfts),
        ttft_p95_s=ttfts[int(0.95 * len(ttfts))],
        tpot_p95_s=tpots[int(0.95 * len(tpots))],
        replica_hours=elastic.replica_s / 3600,
        events=elastic.events,
        most=max(n for _, n in elastic.sizes),
    )


def jobs(seeds: Iterable[int], cases: Sequence[Case]) -> Iterator[tuple[Case, int]]:
    """Seed by seed, so that a day is made once."""
    for seed in seeds:
        for case in cases:
            yield case, seed


def best(rows: Sequence[Row], name: str, attainment: float) -> Row | None:
    """The cheapest run of a rival that served as many in time; None where none did."""
    good = [r for r in rows if r.case.name == name and r.attainment >= attainment - EQUAL]
    return min(good, key=lambda r: r.replica_hours, default=None)


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """One seed: us, each rival as the field configures it, and at its best."""
    us = next(r for r in rows if r.case == WORK)
    found = {name: best(rows, name, us.attainment) for name in ("queue", "gpu", "fixed")}
    scaled = [r for name in ("queue", "gpu") if (r := found[name]) is not None]
    rival = min(scaled, key=lambda r: r.replica_hours, default=None)
    return {
        "seed": us.seed,
        "work": asdict(us),
        "at_equal_attainment": {name: asdict(r) if r else None for name, r in found.items()},
        "replica_hours_ratio": us.replica_hours / rival.replica_hours if rival else None,
        "events_ratio": us.events / rival.events if rival and rival.events else None,
        "rival": rival.case.name if rival else None,
    }


def run(
    seeds: Sequence[int] = SEEDS, cases: Sequence[Case] = (WORK, *SWEEP), each: Mapper[Any, Any] = in_process
) -> dict[str, Any]:
    """Everything; `each` maps over runs, in their order: about half a minute for each of a seed and a case.

    `replica_hours_ratio`: ours over those of the better of the two rivals, at equal attainment; geometric mean over the seeds.
    """
    return summary(list(each(run_case, list(jobs(seeds, cases)))))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What is written."""
    seeds = list(dict.fromkeys(r.seed for r in rows))
    verdicts = [verdict([r for r in rows if r.seed == seed]) for seed in seeds]
    ratios = [v["replica_hours_ratio"] for v in verdicts]
    ours_rows = [r for r in rows if r.case == WORK]
    return {
        "replica_hours_ratio": geomean(ratios) if all(ratios) else None,
        "slo_attainment": fmean(r.attainment for r in ours_rows),
        "scaling_events": fmean(r.events for r in ours_rows),
        "seeds": verdicts,
        "rows": [asdict(r) for r in rows],
    }


def _same(trace: Trace, _: int) -> Trace:
    return trace


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--only", nargs="+", help="names of cases")
    requests = parser.add_mutually_exclusive_group()
    requests.add_argument("--shape", choices=SHAPES, default="two_peaks", help="of the day")
    requests.add_argument("--trace", type=Path, help="requests of this file instead of a day")
    options = parser.parse_args(arguments)
    tuned()
    made = partial(day, shape=options.shape)
    if options.trace:
        recorded = load(options.trace)
        made = partial(_same, recorded)
    cases = [c for c in (WORK, *SWEEP) if not options.only or c.name in options.only or c == WORK]
    rows = []
    for job in jobs(options.seeds, cases):
        began = time.monotonic()
        rows.append(run_case(job, made))
        sys.stdout.write(f"{rows[-1]}  {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary(rows), indent=1, default=str))


if __name__ == "__main__":
    main()
