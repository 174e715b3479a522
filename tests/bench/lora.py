"""What it is worth to know which replica holds which LoRA adapter: .venv/bin/python -m tests.bench.lora

The same requests on the same simulated replicas, by the same policy: once the router knows which models are adapters, and once it takes
each for a model like any other. Twenty adapters of different popularity on four replicas with four slots each; a load holds a batch up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final

from extproc.core.settings import LoraSettings
from extproc.core.steptime import prior
from extproc.core.types import Replica
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec
from extproc.sim.sidecar import Wiring
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
    print(json.dumps(run(), indent=2))
