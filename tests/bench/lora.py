"""What it is worth to know which replica holds which LoRA adapter: .venv/bin/python -m tests.bench.lora [scarce]

The same requests on the same simulated replicas, by the same policy: once the router knows which models are adapters, and once it takes
each for a model like any other. Twenty adapters of different popularity on four replicas with four slots each; a load holds a batch up.

`scarce`: with fewer slots, or longer answers; requests wait once in the engine, and once at the router, for the first slot that is free.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final

from extproc.core.admission.settings import QueueSettings
from extproc.core.settings import LoraSettings
from extproc.core.steptime import prior
from extproc.core.types import Replica
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec
from extproc.sim.sidecar import NO_QUEUE, Wiring
from extproc.sim.traces.base import Trace, Turn

ADAPTERS: Final = 20
REPLICAS: Final = 4
SLOTS: Final = 4
LOAD_S: Final = 0.3
"""Read from disk and copied to the GPU; from the host's memory it is less."""
SKEW: Final = 1.0
"""Zipf's exponent of their popularity."""
RATE_PER_S: Final = 12.0
REQUESTS: Final = 1500
SEEDS: Final = 3
BLOCK: Final = 16
_LABELS: Final = {"gpu": "h100", "tp": "1", "model_size": "8b"}


def names(adapters: int = ADAPTERS) -> tuple[str, ...]:
    """adapter-01 and on, the most popular first."""
    return tuple(f"adapter-{place:02}" for place in range(1, adapters + 1))


def trace(seed: int, requests: int = REQUESTS, rate_per_s: float = RATE_PER_S, skew: float = SKEW) -> Trace:
    """Poisson arrivals; prompts of each adapter share a head, and nothing with those of others."""
    rng, at, every = Random(f"{seed}/lora"), 0.0, names()
    weights = [place**-skew for place in range(1, len(every) + 1)]
    turns, block = [], len(every) * 1000
    for _ in range(requests):
        at += rng.expovariate(rate_per_s)
        place = rng.choices(range(len(every)), weights)[0]
        head, own = 16, rng.randint(8, 120)
        tokens = (head + own) * BLOCK + rng.randrange(BLOCK)
        runs = ((place * 1000, head), (block, own))
        block += own
        turns.append(Turn(tokens, max(round(rng.lognormvariate(4.5, 0.6)), 1), at, runs=runs, adapter=every[place]))
    return Trace("lora", BLOCK, tuple(turns))


def fleet(
    slots: int = SLOTS, load_s: float = LOAD_S, held_by: Sequence[Sequence[str]] | None = None
) -> tuple[NodeSpec, ...]:
    """`held_by`: the adapters that each replica lists; None for all on all."""
    engine = EngineConfig(step_time=prior(_LABELS), block_size=BLOCK, max_loras=slots, lora_load_s=load_s)
    listed = held_by or [names()] * REPLICAS
    return tuple(
        NodeSpec(Replica(f"10.0.0.{place}:8000", _LABELS), engine, tuple(adapters))
        for place, adapters in enumerate(listed, 1)
    )


@dataclass(frozen=True, slots=True)
class Scarce:
    """Requests that are short of slots."""

    slots: int
    rate_per_s: float
    base_share: float
    """Of requests for the base model."""
    routers: int = 1
    longer: float = 3.0
    """Answers, than in the other runs."""


SCARCE: Final = tuple(
    Scarce(*figures, routers) for figures in ((4, 16.0, 0.0), (2, 16.0, 0.5), (2, 8.0, 0.0)) for routers in (1, 2, 4)
)


def play_scarce(case: Scarce, seed: int, held: bool, requests: int = 1000) -> dict[str, float | None]:
    """Mean TTFT of requests for adapters and for the base model, and the number of those refused. `held`: at the router."""
    made, rng = trace(seed, requests, case.rate_per_s), Random(f"{seed}/base")
    turns = tuple(
        replace(
            turn,
            adapter=None if rng.random() < case.base_share else turn.adapter,
            output_tokens=int(turn.output_tokens * case.longer),
        )
        for turn in made.turns
    )
    wiring = Wiring(queue=QueueSettings() if held else NO_QUEUE)
    scenario = Scenario(replace(made, turns=turns), fleet(case.slots), wiring=wiring, seed=seed, routers=case.routers)
    served = Cluster(scenario, "predicted").run().served

    def mean_s(base: bool) -> float | None:
        ttfts = [s.ttft_s for s in served if s.ttft_s is not None and (turns[s.turn].adapter is None) is base]
        return fmean(ttfts) if ttfts else None

    return {"adapters": mean_s(False), "base": mean_s(True), "refused": sum(s.ttft_s is None for s in served)}


def scarce(case: Scarce, held: bool) -> dict[str, float | None]:
    """The same on average."""
    runs = [play_scarce(case, seed, held) for seed in range(1, SEEDS + 1)]
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        key: None if None in values else fmean(v for v in values if v is not None) for key, values in columns.items()
    }


def play(
    seed: int, aware: bool, *, requests: int = REQUESTS, rate_per_s: float = RATE_PER_S, policy: str = "predicted"
) -> Result:
    """One run; `aware`: the router knows of adapters."""
    wiring = Wiring(lists_parents=aware, lora=LoraSettings())
    scenario = Scenario(trace(seed, requests, rate_per_s), fleet(), wiring=replace(wiring), seed=seed)
    return Cluster(scenario, policy).run()


def loads(result: Result) -> int:
    """How often an adapter was loaded."""
    return sum(node.adapter_loads for node in result.nodes)


def mean_ttft_s(result: Result) -> float:
    return fmean(served.ttft_s for served in result.served if served.ttft_s is not None)


def run(_traces: Path | None = None, *, requests: int = REQUESTS, seeds: int = SEEDS) -> dict[str, Any]:
    """No traces are needed. `ratio`: mean TTFT with knowledge of adapters over that without, on the same requests; below 1 is better."""
    pairs = [
        (play(seed, True, requests=requests), play(seed, False, requests=requests)) for seed in range(1, seeds + 1)
    ]
    aware, blind = zip(*pairs, strict=True)
    with_s, without_s = fmean(map(mean_ttft_s, aware)), fmean(map(mean_ttft_s, blind))
    return {
        "ratio": with_s / without_s,
        "ttft_s": {"with": with_s, "without": without_s},
        "loads": {"with": sum(map(loads, aware)), "without": sum(map(loads, blind))},
        "requests": requests * seeds,
        "adapters": ADAPTERS,
        "replicas": REPLICAS,
        "slots": SLOTS,
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["scarce"]:
        for each in SCARCE:
            print(each, {("held" if held else "engine"): scarce(each, held) for held in (False, True)}, flush=True)
    else:
        print(json.dumps(run(), indent=2))
