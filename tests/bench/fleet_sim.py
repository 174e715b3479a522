"""One fleet behind 1, 2, 4 and 8 routers in the simulator, with and without shared state: prefix hits and mean TTFT.

Windows, load and saturation are those of the routing benchmark (`tests/bench/matrix`), at 0.8 of saturation on eight H100; the
wiring is the service's own with its defaults. Requests are dealt to the routers in turn, whatever their session: the worst
case for knowledge of prefixes. Without `--traces` the generated workload alone.

Timestamps of the conversation trace come in steps of three seconds: ten requests and more at the very same instant, which no
two routers can know of each other. Within its step each is put at a random moment; `--instants` leaves them as recorded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.sharing import Sharing
from extproc.sim.sidecar import POOL, Wiring
from extproc.sim.traces import Trace
from tests.bench.matrix.cells import SIZES, SLOS, Cell
from tests.bench.matrix.load import kinds, replica_rate_per_s, total_rate_per_s
from tests.bench.matrix.runs import Figures, Job, figures, replay
from tests.bench.matrix.windows import Source
from tests.bench.routing import Effort, sources

ROUTERS: Final = (1, 2, 4, 8)
SEEDS: Final = (1, 2, 3, 4, 5, 6, 7, 8)
"""The agentic window differs by 10 % and more from one to the next."""
EFFORT: Final = Effort(seeds=len(SEEDS), requests=750, turns=6, evaluations=0)
RECORDED: Final = ("conversation", "agentic")
GENERATED: Final = "chat"
LOAD: Final = 0.8
POLICY: Final = "predicted"
OUTPUT: Final = Path("build/bench-fleet-sim.json")
DEATH_AT_S: Final = 10.0
HIT_WANTED, TTFT_WANTED = 0.97, 1.05


@dataclass(frozen=True, slots=True)
class Runs:
    """Figures by number of routers, one for each seed."""

    shared: Mapping[int, Sequence[Figures]]
    unshared: Mapping[int, Sequence[Figures]]


def scenario(source: Source, seed: int, instants: bool = False) -> tuple[Scenario, frozenset[int]]:
    """The window at its load, and the places of the turns that are scored."""
    cell = Cell(source.name, LOAD)
    rates = [(replica_rate_per_s(kind), count) for kind, count in kinds(cell, source, seed)]
    shared = replay(Job(cell, source, seed, None, total_rate_per_s(rates)))
    found = shared.scenario
    if source.name == "conversation" and not instants:
        found = replace(found, trace=spread(found.trace, seed))
    return replace(found, wiring=Wiring()), shared.scored


def spread(trace: Trace, seed: int) -> Trace:
    """Each turn by the clock at a random moment of the step in which it was recorded."""
    times = sorted({turn.delay_s for turn in trace.turns})
    step = min((after - before for before, after in pairwise(times)), default=0.0)
    rng = Random(f"{seed}/spread")
    return replace(trace, turns=tuple(replace(t, delay_s=t.delay_s + step * rng.random()) for t in trace.turns))


def measure(source: Source, seeds: Sequence[int], talk: Sharing, instants: bool = False) -> Runs:
    """Every number of routers, shared and not, on every seed."""
    shared: dict[int, list[Figures]] = {n: [] for n in ROUTERS}
    unshared: dict[int, list[Figures]] = {n: [] for n in ROUTERS}
    for seed in seeds:
        base, scored = scenario(source, seed, instants)
        for routers in ROUTERS:
            for runs, sharing in ((unshared, None), (shared, talk)):
                if routers == 1 and runs is shared:
                    shared[1].append(unshared[1][-1])  # there is nobody to talk to
                    continue
                each = replace(base, routers=routers, wiring=replace(base.wiring, sharing=sharing))
                runs[routers].append(figures(Cluster(each, POLICY).run().served, scored, SLOS[SIZES["equal"]]))
    return Runs(shared, unshared)


def against_one(runs: Mapping[int, Sequence[Figures]], name: str) -> dict[str, float]:
    """Mean of a figure by number of routers, over that of one router: the mean over the seeds of their ratios."""
    one = [getattr(f, name) for f in runs[1]]
    return {
        str(n): sum(getattr(f, name) / alone for f, alone in zip(each, one, strict=True)) / len(one)
        for n, each in runs.items()
    }


def document(runs: Runs) -> dict[str, Any]:
    """Of one trace, as the file has it."""
    return {
        "hit_ratio": against_one(runs.shared, "hit"),
        "hit_ratio_unshared": against_one(runs.unshared, "hit"),
        "ttft_ratio": against_one(runs.shared, "ttft_mean_s"),
        "ttft_ratio_unshared": against_one(runs.unshared, "ttft_mean_s"),
        "hit": sum(f.hit for f in runs.shared[1]) / len(runs.shared[1]),
        "ttft_mean_s": sum(f.ttft_mean_s for f in runs.shared[1]) / len(runs.shared[1]),
        "errors": sum(f.errors for each in (*runs.shared.values(), *runs.unshared.values()) for f in each),
    }


def router_death_s(source: Source, seed: int) -> float:
    """Seconds from the death of one of four routers until none of the others counts its load; virtual time."""
    base, _ = scenario(source, seed)
    wiring = replace(base.wiring, sharing=Sharing())
    cluster = Cluster(replace(base, routers=4, wiring=wiring, router_deaths=((DEATH_AT_S, 1),)), POLICY)
    return cluster.until(lambda now: now > DEATH_AT_S and not _known(cluster, "0")) - DEATH_AT_S


def _known(cluster: Cluster, peer: str) -> bool:
    others = (sidecar for sidecar in cluster.sidecars if sidecar.alive)
    return any(sidecar.router.pools[POOL].peers.knows(peer) for sidecar in others)


def table(traces: Mapping[str, Mapping[str, Any]]) -> Table:
    grid = Table(title="against one router, mean over seeds of the ratio")
    for name in ("trace", "", *map(str, ROUTERS)):
        grid.add_column(name, justify="left" if name == "trace" or not name else "right")
    for trace, found in traces.items():
        for key in ("hit_ratio", "hit_ratio_unshared", "ttft_ratio", "ttft_ratio_unshared"):
            grid.add_row(trace, key, *(f"{found[key][str(n)]:.3f}" for n in ROUTERS))
    return grid


def main(args: Sequence[str]) -> int:
    """0 where every trace is within what is wanted at eight routers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="Folder of the recorded traces.")
    parser.add_argument("--beat", type=float, default=Sharing().beat_s, help="Seconds between two words of a router.")
    parser.add_argument("--no-push", action="store_true", help="By beats alone.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--requests", type=int, default=EFFORT.requests, help="Of one window.")
    parser.add_argument("--instants", action="store_true", help="Leave recorded timestamps as they are.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args(args)
    found = sources(replace(EFFORT, requests=given.requests), given.traces, ())
    names = [*(RECORDED if given.traces else ()), GENERATED]
    seeds = SEEDS[: given.seeds]
    talk = Sharing(beat_s=given.beat, push=not given.no_push)
    traces = {name: document(measure(found[name], seeds, talk, given.instants)) for name in names}
    result = {
        "beat_s": talk.beat_s,
        "push": talk.push,
        "traces": traces,
        "router_death_s": router_death_s(found[GENERATED], 1),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=120).print(table(traces))
    good = (t["hit_ratio"]["8"] >= HIT_WANTED and t["ttft_ratio"]["8"] <= TTFT_WANTED for t in traces.values())
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
