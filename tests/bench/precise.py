"""What it is worth to know the replicas' prefix caches exactly: `python -m tests.bench.precise`, by the lag of their events.

The same windows of traces at the same load, on the same router: with the approximate index, which knows what it sent where, and with
the exact one, which replicas tell of their caches; that one also without what is pending, so that a prompt counts only once the engine
has told of its blocks. Caches as large as the GPUs' memory leaves, and a third of that, where most of what was computed is evicted again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from timeit import timeit
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from extproc.core.prefix.blocks import chain
from extproc.core.prefix.caches import Caches
from extproc.core.prefix.exact import UNIT, token_chain
from extproc.core.prefix.pending import Chain, Pending
from extproc.core.types import BlocksStored, End, PrefixSource, Request
from extproc.sim.cluster import Cluster, Scenario, Served
from extproc.sim.kv_events import Events
from extproc.sim.node import NodeSpec
from extproc.sim.sidecar import POOL
from extproc.sim.traces import Trace, TraceError
from tests.bench.matrix.cells import FLEETS, SIZES, Cell, fleet
from tests.bench.matrix.load import LoadError, saturation_per_s
from tests.bench.matrix.runs import OURS, Job, replay
from tests.bench.matrix.summary import geomean
from tests.bench.matrix.windows import GENERATED, RECORDED, Source, window
from tests.bench.routing import Mapper, finite, in_process, pool

OUTPUT: Final = Path("build/bench-precise.json")
LAGS_S: Final = (0.0, 0.002, 0.1, 1.0)
USUAL_LAG_S: Final = 0.002
"""What vLLM 0.32 takes as a median is 1.6 ms."""
LOAD: Final = 0.8
"""Share of what the fleet can take."""
CACHES: Final[Mapping[str, int]] = {"hbm": 1, "third": 3}
"""KV cache: what the GPUs' memory leaves, divided by this. A third still holds the longest prompt."""
TRACES: Final = ("conversation", "agentic", "chat", "siblings", "hot")
"""Those in which something is shared."""
TURNS: Final = 8
REQUESTS: Final[Mapping[str, int]] = {"agentic": 500}
SEEDS: Final = 4
"""Of placements that depend on each other: one run and the next differ by 5 % for reasons of no account."""
REQUESTS_OF_WINDOW: Final = 1200


@dataclass(frozen=True, slots=True)
class Way:
    """How the router knows the caches."""

    lag_s: float | None = None
    """Of the replicas' events; None where they tell nothing."""
    pending: bool = True
    """Whether a prompt counts from the moment at which it is sent."""

    def __str__(self) -> str:
        if self.lag_s is None:
            return "approximate"
        return f"{self.lag_s * 1e3:g} ms" + ("" if self.pending else ", without pending")


APPROXIMATE: Final = Way()
WAYS: Final = (
    APPROXIMATE,
    *(Way(lag_s) for lag_s in LAGS_S),
    *(Way(lag_s, pending=False) for lag_s in (USUAL_LAG_S, 1.0)),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A window and the replicas that it is replayed on."""

    source: Source
    seed: int
    cache: str


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    place: Place
    way: Way
    saturation_per_s: float


class _Unsent(Pending):
    """Nothing is pending, whatever was sent."""

    def insert(self, flight: str, address: str, chain: Chain) -> None:
        """Forget it."""


def sources(folder: Path | None, requests: int) -> list[Source]:
    """Every trace that there is. Raises TraceError for a file that is not there."""
    found = []
    for name in TRACES:
        path = None if name in GENERATED else folder / RECORDED[name] if folder else None
        if path is None and name not in GENERATED:
            continue
        if path is not None and not path.is_file():
            raise TraceError(f"{path}: no such file")
        found.append(Source(name, min(requests, REQUESTS.get(name, requests)), TURNS, path))
    return found


def saturation(place: Place) -> float:
    """Requests a second that the fleet can take with these caches. Raises LoadError."""
    trace = window(place.source, place.seed)
    return saturation_per_s(trace, _fleet(place, trace), place.seed)


def _fleet(place: Place, trace: Trace) -> tuple[NodeSpec, ...]:
    whole = fleet(FLEETS["equal"], SIZES["equal"], "hbm", trace.block_size)
    return tuple(_smaller(spec, CACHES[place.cache]) for spec in whole)


def run_one(task: Task) -> dict[str, float]:
    """The figures of one run."""
    place = task.place
    shared = replay(Job(Cell(place.source.name, LOAD), place.source, place.seed, None, task.saturation_per_s))
    served = _served(_with(shared.scenario, place, task.way), task.way)
    return figures([s for s in served if s.turn in shared.scored])


def _with(scenario: Scenario, place: Place, way: Way) -> Scenario:
    events = None if way.lag_s is None else Events(way.lag_s)
    return replace(scenario, fleet=_fleet(place, scenario.trace), wiring=replace(scenario.wiring, events=events))


def _smaller(spec: NodeSpec, divisor: int) -> NodeSpec:
    blocks = spec.engine.num_blocks // divisor
    engine = replace(spec.engine, num_blocks=blocks, max_model_len=blocks * spec.engine.block_size)
    return replace(spec, engine=engine)


def _served(scenario: Scenario, way: Way) -> Sequence[Served]:
    cluster = Cluster(scenario, OURS)
    if not way.pending:
        for sidecar in cluster.sidecars:
            sidecar.router.pools[POOL].caches.pending = _Unsent()
    return cluster.run().served


def figures(served: Sequence[Served]) -> dict[str, float]:
    """Of the requests that count. Times are seconds, the others shares."""
    good = [s for s in served if s.end is End.OK and s.ttft_s is not None]
    told = [s for s in good if s.cached_tokens is not None and s.predicted_cached_tokens is not None]
    prompts = sum(s.prompt_tokens for s in good)
    ttfts = sorted(s.ttft_s for s in good if s.ttft_s is not None)
    return {
        "ttft_mean_s": fmean(ttfts),
        "ttft_p99_s": ttfts[min(int(0.99 * len(ttfts)), len(ttfts) - 1)],
        "e2e_mean_s": fmean(s.e2e_s for s in good),
        "hit": sum(s.cached_tokens or 0 for s in good) / prompts,
        "right": fmean(s.cached_tokens == s.predicted_cached_tokens for s in told),
        "exact": fmean(s.prefix_source is PrefixSource.EXACT for s in good),
        "failed": float(len(served) - len(good)),
    }


def measure(places: Sequence[Place], ways: Sequence[Way], each: Mapper[Any, Any]) -> dict[str, Any]:
    """All runs. `each` maps a function over jobs, in order. Raises LoadError, TraceError."""
    rates = dict(zip(places, each(saturation, places), strict=True))
    tasks = [Task(place, way, rates[place]) for place in places for way in ways]
    found: dict[tuple[str, str, Way], list[dict[str, float]]] = {}
    for task, result in zip(tasks, each(run_one, tasks), strict=True):
        found.setdefault((task.place.source.name, task.place.cache, task.way), []).append(result)
    cells = [_cell(*setting, seeds, found[setting[0], setting[1], APPROXIMATE]) for setting, seeds in found.items()]
    return {"cells": cells, **summary(cells)}


def _cell(
    trace: str, cache: str, way: Way, seeds: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Means over the seeds, and what is saved against the approximate index on the same windows."""
    ratios = {
        name: geomean([one[name] / other[name] for one, other in zip(seeds, base, strict=True)])
        for name in ("ttft_mean_s", "ttft_p99_s", "e2e_mean_s")
    }
    means = {name: fmean(one[name] for one in seeds) for name in seeds[0]}
    gains = {f"gain_{name.removesuffix('_s').removesuffix('_mean')}": 1.0 - ratio for name, ratio in ratios.items()}
    return {"trace": trace, "cache": cache, "way": str(way), **means, **gains}


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Geometric means over traces and caches of what is saved of the mean TTFT, by the lag of events; 0.05 is a twentieth."""
    ways = list(dict.fromkeys(cell["way"] for cell in cells))
    gains = {way: _gain([c for c in cells if c["way"] == way]) for way in ways if way != str(APPROXIMATE)}
    return {
        "gain_ttft": gains.get(str(Way(USUAL_LAG_S))),
        "gain_ttft_by_lag": gains,
        "right": {way: fmean(c["right"] for c in cells if c["way"] == way) for way in ways},
    }


def _gain(cells: Sequence[Mapping[str, Any]]) -> float:
    return 1.0 - geomean([1.0 - cell["gain_ttft"] for cell in cells])


def _places(folder: Path | None, requests: int, seeds: int) -> Iterator[Place]:
    for source in sources(folder, requests):
        for seed in range(1, seeds + 1):
            for cache in CACHES:
                yield Place(source, seed, cache)


def run(
    traces: Path | None = None,
    requests: int = REQUESTS_OF_WINDOW,
    seeds: int = SEEDS,
    each: Mapper[Any, Any] = in_process,
) -> dict[str, Any]:
    """The figures; `traces`: folder of the recorded ones. Raises TraceError, LoadError."""
    document: dict[str, Any] = finite(measure(list(_places(traces, requests, seeds)), WAYS, each))
    return document


BRIEFLY: Final = (750, 2)
"""Requests of a window, and seeds, where there is less time: fewer requests do not reach saturation."""


def briefly(traces: Path | None) -> dict[str, Any]:
    """The summary of a shorter run on all cores, for `make bench-models`."""
    console = Console(width=160)
    with pool(os.cpu_count() or 1, console, {saturation: "saturation", run_one: "runs"}) as each:
        document = run(traces, *BRIEFLY, each)
    return {name: document[name] for name in ("gain_ttft", "gain_ttft_by_lag", "right")}


# --- the cost of asking ---------------------------------------------------------------------------------------------------


def cost(prompt_tokens: int, replicas: int, rounds: int = 200) -> dict[str, float]:
    """Microseconds, the least of several rounds: to ask one index or both, to note a placement and its end, to hash the prompt.

    The replicas hold parts of the prompt, all of different lengths, which is the worst case.
    """
    rng = Random(1)
    ids = [rng.randrange(100_000) for _ in range(prompt_tokens)]
    prompt = rng.randbytes(4 * prompt_tokens)
    guessed = Request(blocks=chain(b"", prompt), prompt_bytes=len(prompt), prompt_tokens=prompt_tokens)
    known = replace(guessed, tokens=token_chain(ids))
    caches, blocks = Caches(), prompt_tokens // UNIT
    for i in range(replicas):
        held = max(blocks * (i + 1) // replicas, 1)
        caches.index.insert(f"r{i}", guessed.blocks)
        stored = BlocksStored(tuple(range(held)), None, tuple(ids[: held * UNIT]), UNIT)
        caches.exact.apply(f"r{i}", [stored], 0.0)

    def note() -> None:
        caches.pending.insert("f", "r0", known.tokens.hashes if known.tokens else ())
        caches.pending.remove("f")

    asked: dict[str, Callable[[], object]] = {
        "approximate": lambda: caches.hits(guessed, prompt_tokens),
        "both": lambda: caches.hits(known, prompt_tokens),
        "pending": note,
        "hashing": lambda: token_chain(ids),
    }
    return {name: min(timeit(each, number=1) for _ in range(rounds)) * 1e6 for name, each in asked.items()}


def costs() -> Table:
    """By length of the prompt and number of replicas."""
    made = Table("prompt tokens", "replicas", "approximate, us", "both, us", "pending, us", "hashing, us")
    for tokens, replicas in product((2000, 10_000, 100_000), (8, 50)):
        made.add_row(f"{tokens:,}", str(replicas), *(f"{us:.0f}" for us in cost(tokens, replicas).values()))
    return made


def table(document: Mapping[str, Any]) -> Table:
    """For the console."""
    made = Table(
        "trace",
        "cache",
        "caches known by",
        "TTFT mean, ms",
        "p99, ms",
        "hit",
        "predicted right",
        "TTFT saved",
        "p99 saved",
    )
    for cell in document["cells"]:
        shown = (cell["ttft_mean_s"] * 1e3, cell["ttft_p99_s"] * 1e3)
        shares = (f"{cell[name]:.1%}" for name in ("hit", "right", "gain_ttft", "gain_ttft_p99"))
        made.add_row(cell["trace"], cell["cache"], cell["way"], *(f"{ms:,.0f}" for ms in shown), *shares)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="what exact knowledge of prefix caches is worth, by the lag of KV events"
    )
    parser.add_argument("--traces", type=Path, help=f"folder with {', '.join(RECORDED.values())}")
    parser.add_argument("--requests", type=int, default=REQUESTS_OF_WINDOW, help="of one window")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--cost", action="store_true", help="only what it costs to ask")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    if options.cost:
        console.print(costs())
        return
    started = time.monotonic()
    try:
        with pool(options.jobs, console, {saturation: "saturation", run_one: "runs"}) as each:
            document = run(options.traces, options.requests, options.seeds, each)
    except (TraceError, LoadError) as e:
        sys.exit(str(e))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    console.print(table(document))
    console.print({name: document[name] for name in ("gain_ttft", "gain_ttft_by_lag", "right")})
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes; figures in {options.output}")


if __name__ == "__main__":
    main()
