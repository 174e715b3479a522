"""What pushes cost: eight routers of one process with a hundred replicas each, a real Redis, and a steady stream of requests.

python -m tests.bench.fleet_pushes [--rate 100] [--routers 8] [--replicas 100]

The same requests are placed twice, with sharing and without; the difference in CPU, over the routers, is what one pays. The time
from a placement to the moment at which another router has learned it is that of one event loop that serves all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from random import Random
from typing import Any, Final

import uvloop

from extproc.adapters.shared.pushing import Changes
from extproc.adapters.shared.redis_board import RedisBoard
from extproc.adapters.shared.redis_channel import RedisChannel
from extproc.adapters.shared.sharing import Sharing
from extproc.config import Shared
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, Fact, Outcome, Placed, Reset, Route
from tests.core.support import POOL, replicas, request, text
from tests.support.redis import RedisServer
from tests.support.waiting import until

MEASURED_S: Final = 8.0
WARM_S: Final = 3.0
"""A router that joined hears placements twice for a while."""
TOGETHER_S: Final = 30.0
PROMPT_BYTES: Final = 16_000
HEADS: Final = 200
"""Prompts share one of so many first halves."""
RUNS_S: Final = 0.5
"""How long a request is in flight."""


class Sidecar:
    """One router with its part in the fleet."""

    def __init__(self, number: int, members: int, learned: Callable[[Placed], None]) -> None:
        changes = Changes()
        self.router = Router([PoolSettings(POOL)], Random(number), changes)
        self.router.learn(Reset(POOL, replicas(members)), now())
        self.sharing = Sharing(self.router, self._learn, now, Random(f"router {number}"), changes)
        self._learned = learned

    def _learn(self, fact: Fact) -> None:
        self.router.learn(fact, now())
        if isinstance(fact, Placed):
            self._learned(fact)

    def place(self, prompt: bytes) -> int | None:
        """A request comes, and ends after a while. Returns the hash of its last block."""
        asked = request(prompt)
        verdict = self.router.arrive(asked, now())
        if not isinstance(verdict, Route):
            return None
        asyncio.get_running_loop().call_later(RUNS_S, self._end, verdict.flight)
        return asked.blocks.hashes[-1]

    def _end(self, flight: str) -> None:
        self.router.finish(flight, Outcome(End.OK), now())


class Delays:
    """From a placement to the moment at which another router learned it."""

    def __init__(self) -> None:
        self._placed: dict[int, float] = {}
        self.found_s: list[float] = []

    def placed(self, last: int | None) -> None:
        if last is not None:
            self._placed[last] = now()

    def learned(self, fact: Placed) -> None:
        if (at := self._placed.get(fact.blocks.hashes[-1])) is not None:
            self.found_s.append(now() - at)

    def at(self, share: float) -> float | None:
        """Milliseconds; None without any."""
        ordered = sorted(self.found_s)
        return round(ordered[int(share * (len(ordered) - 1))] * 1e3, 2) if ordered else None


def now() -> float:
    return time.monotonic()


@asynccontextmanager
async def together(sidecars: list[Sidecar], shared: Shared) -> AsyncIterator[None]:
    """All of them share during the block."""
    async with AsyncExitStack() as exits:
        for sidecar in sidecars:
            name = sidecar.sharing.name
            ways = RedisBoard(shared, name), RedisChannel(shared, name) if shared.push else None
            task = asyncio.create_task(sidecar.sharing.run(shared, "Redis", *ways))
            exits.push_async_callback(partial(asyncio.gather, task, return_exceptions=True))
            exits.callback(task.cancel)
        await until(lambda: all(s.sharing.peers == len(sidecars) - 1 for s in sidecars), timeout_s=TOGETHER_S)
        if shared.push:
            await until(lambda: all(s.sharing.state.pushing for s in sidecars), timeout_s=TOGETHER_S)
        yield


async def load(sidecars: list[Sidecar], rate: float, seconds: float, delays: Delays) -> float:
    """So many requests a second to each. Returns the seconds of CPU that all of it took."""
    rng, heads = Random(1), [text(PROMPT_BYTES // 2, i) for i in range(HEADS)]
    began, spent, sent = now(), time.process_time(), 0
    while (elapsed_s := now() - began) < seconds:
        for _ in range(int(elapsed_s * rate * len(sidecars)) - sent):
            sent += 1
            prompt = rng.choice(heads) + text(PROMPT_BYTES // 2, HEADS + sent)
            delays.placed(rng.choice(sidecars).place(prompt))
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
    return time.process_time() - spent


async def measure(
    routers: int, members: int, rate: float, push: bool = True, seconds: float = MEASURED_S, warm_s: float = WARM_S
) -> dict[str, Any]:
    """CPU per router with and without sharing, bytes a second, and delays; by beats alone without `push`."""
    async with RedisServer() as redis:
        delays, shared = Delays(), Shared(url=redis.url, push=push)
        alone = [Sidecar(i, members, delays.learned) for i in range(routers)]
        alone_s = await load(alone, rate, seconds, delays)
        sidecars = [Sidecar(i, members, delays.learned) for i in range(routers)]
        async with together(sidecars, shared):
            await load(sidecars, rate, warm_s, delays)
            before, delays.found_s = await traffic(redis), []
            counted = [s.sharing.state.pushes_sent for s in sidecars]
            shared_s = await load(sidecars, rate, seconds, delays)
            after = await traffic(redis)
            states = [s.sharing.state for s in sidecars]
            assert all(s.pushing == push and not s.errors for s in states)
            pushes = sum(s.pushes_sent for s in states) - sum(counted)
    return {
        "by": "pushes" if push else "beats alone",
        "routers": routers,
        "replicas": members,
        "requests_per_s_per_router": rate,
        "pushes_per_s_per_router": round(pushes / seconds / routers, 1),
        "cpu_per_router": round((shared_s - alone_s) / seconds / routers, 4),
        "cpu_per_router_unshared": round(alone_s / seconds / routers, 4),
        "redis_bytes_per_s_per_router": round((after - before) / seconds / routers),
        "learned_after_ms": {"p50": delays.at(0.5), "p99": delays.at(0.99)},
        "pushes_lost": sum(s.pushes_lost for s in states),
    }


async def traffic(redis: RedisServer) -> int:
    stats = await redis.command("INFO", "stats")
    total: int = stats["total_net_input_bytes"] + stats["total_net_output_bytes"]
    return total


def run(routers: int = 8, members: int = 100, rates: tuple[float, ...] = (10.0, 100.0)) -> list[dict[str, Any]]:
    """Two rows for each rate of requests: by pushes, and by beats alone."""
    return [uvloop.run(measure(routers, members, rate, push)) for rate in rates for push in (True, False)]


def main() -> int:
    """0 when it could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rate", type=float, nargs="+", default=[10.0, 100.0], help="Requests a second to each router."
    )
    parser.add_argument("--routers", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=100)
    given = parser.parse_args()
    for row in run(given.routers, given.replicas, tuple(given.rate)):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
