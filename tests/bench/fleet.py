"""`make bench-fleet`: what a fleet of routers comes to; build/bench-fleet.json.

python -m tests.bench.fleet [--only PART ...] [--traces FOLDER]

Parts: `simulator` (hit ratio and mean TTFT at 1, 2, 4, 8 routers), `beat` (CPU of one beat in a large fleet), `pushes` (CPU and
bytes of pushes in one, and how soon others know), `processes` (a router dies, faults of Redis, what sharing costs), `limits` (overshoot of a limit that four routers share), `scaling` (the signal against its
rivals; build/bench-scaling.json where it is there). What was never run is
null; with `--only` the other parts keep what an earlier run has found.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

from extproc.adapters.shared import wire
from extproc.core.prefix.blocks import chain
from extproc.core.router import PoolSettings, Router
from extproc.core.types import PeerJudged, PeerReported, Placed, Reset
from tests.bench import fleet_processes
from tests.bench.gathering import gather
from tests.core.support import POOL, address, replicas, request, text

OUTPUT: Final = Path("build/bench-fleet.json")
SCALING: Final = Path("build/bench-scaling.json")
KEYS: Final = (
    "hit_ratio",
    "hit_ratio_unshared",
    "ttft_ratio_8",
    "router_death_s",
    "limit_overshoot",
    "redis_faults",
    "replica_hours_ratio",
    "slo_attainment",
)
"""Always in the file."""
PEERS: Final = 7
REPLICAS: Final = 64
PLACEMENTS: Final = 25
"""Of each router in a beat: 50 requests a second."""
PROMPT_BYTES: Final = 16_000
BEATS: Final = 20


def simulator(traces: Path | None) -> dict[str, Any]:
    """Hit ratio and TTFT by number of routers against those of one, in virtual time: of the trace that fares worst."""
    module = importlib.import_module("tests.bench.fleet_sim")
    module.main(["--traces", str(traces)] if traces else [])
    return worst(json.loads(module.OUTPUT.read_text()))


def worst(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of the issue from those of several traces."""
    each = list(found["traces"].values())
    return {
        "hit_ratio": {n: min(t["hit_ratio"][n] for t in each) for n in each[0]["hit_ratio"]},
        "hit_ratio_unshared": {n: min(t["hit_ratio_unshared"][n] for t in each) for n in each[0]["hit_ratio_unshared"]},
        "ttft_ratio_8": max(t["ttft_ratio"]["8"] for t in each),
        "simulator": found,
    }


def processes() -> dict[str, Any]:
    """Real processes and a real Redis."""
    found = asyncio.run(fleet_processes.run(OUTPUT.with_suffix("").absolute()))
    return {"router_death_s": found["death"]["router_death_s"], **found}


def limits() -> dict[str, Any]:
    """What four routers let pass beyond a limit, as a share of it."""
    return {"limit_overshoot": importlib.import_module("tests.bench.limits").overshoot()}


def scaling() -> dict[str, Any]:
    """As last written by its own benchmark, else from a run."""
    if SCALING.exists():
        found = json.loads(SCALING.read_text())
    else:
        found = importlib.import_module("tests.bench.scaling").run()
    return {key: found[key] for key in ("replica_hours_ratio", "slo_attainment")}


def beat() -> dict[str, Any]:
    """Milliseconds of CPU of one beat: its own state and placements encoded, those of seven peers read and learned."""
    router = Router([PoolSettings(POOL)], Random(0))
    router.learn(Reset(POOL, replicas(REPLICAS)), 0.0)
    router.placements()
    for i in range(4 * REPLICAS):
        router.arrive(request(text(PROMPT_BYTES, i)), i / 1e3)
    state = said(router, 1, 1.0)
    batches = [wire.batch(placements(peer))[0] for peer in range(PEERS * BEATS)]
    began = time.process_time()
    for i in range(BEATS):
        now = 1.0 + i / 2
        said(router, i, now)
        wire.batch(placements(i))
        for peer in range(PEERS):
            learn(router, f"{peer}", state, batches[i * PEERS + peer], now)
    spent_ms = (time.process_time() - began) / BEATS * 1e3
    return {
        "beat": {
            "cpu_ms": round(spent_ms, 2),
            "routers": PEERS + 1,
            "replicas": REPLICAS,
            "state_bytes": len(state),
            "batch_bytes": len(batches[0]),
            "placements": PLACEMENTS,
        }
    }


def said(router: Router, number: int, now: float) -> bytes:
    """What the router tells at a beat."""
    pool = wire.PoolState(POOL, router.report(POOL, now), router.verdicts(POOL, now), router.served(POOL))
    return wire.state(wire.State(number, (pool,)))


def pushes() -> dict[str, Any]:
    """What pushes cost, by a real Redis."""
    return {"pushes": importlib.import_module("tests.bench.fleet_pushes").run()}


def placements(seed: int) -> list[Placed]:
    """Of one router in one beat: prompts that share a head of half their length, four of them at a time."""
    heads = [text(PROMPT_BYTES // 2, 10_000 + seed * 10 + i) for i in range(4)]
    prompts = [heads[i % 4] + text(PROMPT_BYTES // 2, seed * 1_000 + i) for i in range(PLACEMENTS)]
    return [Placed(POOL, address(i % REPLICAS), chain(b"m", prompt)) for i, prompt in enumerate(prompts)]


def learn(router: Router, peer: str, state: bytes, batch: bytes, now: float) -> None:
    for pool in wire.read_state(state).pools:
        router.learn(PeerReported(pool.pool, peer, pool.loads), now)
        router.learn(PeerJudged(pool.pool, peer, pool.judgements), now)
    for each in wire.read_batch(batch):
        router.learn(each, now)


PARTS: Final[dict[str, Callable[[Path | None], dict[str, Any]]]] = {
    "simulator": simulator,
    "beat": lambda _: beat(),
    "pushes": lambda _: pushes(),
    "processes": lambda _: processes(),
    "limits": lambda _: limits(),
    "scaling": lambda _: scaling(),
}
"""Each gets the folder of the recorded traces, if there is one."""


if __name__ == "__main__":
    sys.exit(gather(OUTPUT, KEYS, PARTS, __doc__ or ""))
