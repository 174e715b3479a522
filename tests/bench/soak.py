"""`make soak`: a million requests through the whole service but its sockets, with churn of replicas, tenants and prompts.

python -m tests.bench.soak [--requests 1000000]

Bodies are read, requests decided, held, left, answered, failed, and lost, as their bytes would come from Envoy; metrics and the decision
log listen. Time is virtual. In the end every ledger must be at zero, and after the first fifth resident memory may grow by 5 % at most.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import orjson
from prometheus_client import CollectorRegistry, generate_latest

from extproc.adapters.metrics import FleetCollector, RouterMetrics
from extproc.adapters.recorder import Recorder
from extproc.config import Config
from extproc.core.observers import Several
from extproc.core.router import PoolSettings, Router
from extproc.core.types import (
    Add,
    End,
    NotSampled,
    Outcome,
    Progressed,
    Remove,
    Replica,
    Reset,
    Route,
    Sample,
    Sampled,
    ScrapeFailure,
    Usage,
)
from extproc.envoy.exchange import Head, Steer
from extproc.envoy.intake import Hold, Intake

POOL = "default"
REPLICAS = 8
RATES = (50.0, 50.0, 50.0, 200.0)
"""Requests a virtual second, in waves: in every fourth the fleet says that it is full, and requests are held."""
WAVE = 2500
WARM = 0.2
GROWTH = 1.05
CHAT = "/v1/chat/completions"
ENDS = (End.OK,) * 40 + (End.UPSTREAM_ERROR, End.CLIENT_GONE, End.CLIENT_ERROR, End.UNREACHABLE, End.TIMEOUT, None)
"""None: its end is never reported."""
CONFIG = Config.model_validate(
    {"pools": [{"models": ["m"], "replicas": ["10.0.0.1:1"]}], "requests": {"tenant_header": "x-tenant"}}
)


@dataclass
class Tally:
    """What became of the requests."""

    sent: int = 0
    steered: int = 0
    refused: int = 0
    held: int = 0
    left: int = 0
    ends: dict[str, int] = field(default_factory=dict)


class Soak:
    """One run. `step` is one request and all that is due before it."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        registry = CollectorRegistry()
        self.registry = registry
        metrics, recorder = RouterMetrics(registry), Recorder(CONFIG.inspect.decisions)
        settings = PoolSettings(POOL, ("m",))
        self.router = Router([settings], Random(seed), Several(metrics, recorder), CONFIG.requests.flight_ttl_s)
        registry.register(FleetCollector(self.router, lambda: self.now))
        self.intake = Intake(self.router, CONFIG, key=b"k")
        self.tally = Tally()
        self.held: dict[str, Hold] = {}
        self.served: dict[str, str] = {}
        self.due: list[tuple[float, int, str, str]] = []  # time, number, what, flight
        self.addresses = [f"10.0.0.{i}:8000" for i in range(1, REPLICAS + 1)]
        self.joined = REPLICAS
        self.router.learn(Reset(POOL, tuple(map(Replica, self.addresses))), 0.0)
        self.texts = [self._text(2000) for _ in range(50)]

    def _text(self, size: int) -> str:
        return "".join(self.rng.choices("abcdefgh ", k=size))

    def step(self) -> None:
        """One request more."""
        self.tally.sent += 1
        self.now += self.rng.expovariate(RATES[self._wave])
        self._happen()
        n = self.tally.sent
        if n % 25 == 0:
            self._sample()
        if n % 2000 == 0:
            self._churn()
        if n % 5000 == 0:
            generate_latest(self.registry)
        self._arrive(n)
        self._turns()

    def _arrive(self, n: int) -> None:
        body = orjson.dumps(self._request(n))
        tenant = f"t{self.rng.randrange(n // 10 + 1)}" if self.rng.random() < 0.1 else f"t{n % 7}"
        headers = {"x-tenant": tenant, "x-request-priority": str(self.rng.randrange(3)), "x-session-id": f"s{n // 3}"}
        answer = self.intake.decide(Head("POST", CHAT, headers=headers), body, self.now, rewritable=True)
        if isinstance(answer, Hold):
            self.tally.held += 1
            self.held[answer.ticket] = answer
            if self.rng.random() < 0.05:
                self._at(self.rng.expovariate(1.0), "leave", answer.ticket)
        elif isinstance(answer, Steer):
            self._steered(answer)
        else:
            self.tally.refused += 1

    def _request(self, n: int) -> dict[str, Any]:
        head = self.texts[self.rng.randrange(len(self.texts))]
        if n % 50 == 0:
            self.texts[self.rng.randrange(len(self.texts))] = self._text(self.rng.randrange(200, 8000))
        messages = [{"role": "system", "content": head}, {"role": "user", "content": f"{n} {head[: n % 300]}"}]
        return {"model": "m", "messages": messages, "stream": n % 3 > 0, "max_tokens": 1 + n % 500}

    def _steered(self, steer: Steer) -> None:
        flight = steer.flight
        self.tally.steered += 1
        end = self.rng.choice(ENDS)
        took = self.rng.expovariate(1.0)
        if self.rng.random() < 0.3:
            self._at(took / 2, "progress", flight)
        if end is not None:
            self.served[flight] = steer.destination.partition(",")[0]
            self._at(took, end.value, flight)

    def _at(self, in_s: float, what: str, flight: str) -> None:
        heapq.heappush(self.due, (self.now + in_s, self.tally.sent, what, flight))

    def _happen(self) -> None:
        """All that is due."""
        while self.due and self.due[0][0] <= self.now:
            at, _, what, name = heapq.heappop(self.due)
            if what == "progress":
                self.router.learn(Progressed(name, 0.1, 0.1, 500), at)
            elif what == "leave":
                if name in self.held:
                    self.tally.left += 1
                    self.intake.leave(self.held.pop(name), at)
            else:
                self._ends(name, End(what), at)
        if lost := self.router.expire(self.now):
            self._count("lost", lost)

    def _ends(self, flight: str, end: End, at: float) -> None:
        status = {End.OK: 200, End.CLIENT_ERROR: 400, End.CLIENT_GONE: None}.get(end, 503)
        usage = Usage(600, 40, 300) if end is End.OK else None
        outcome = Outcome(end, status, self.served.pop(flight), 1, 0.1, 0.1, 0.5, 7000, usage)
        self.router.finish(flight, outcome, at)
        self._count(end.value, 1)

    def _count(self, what: str, n: int) -> None:
        self.tally.ends[what] = self.tally.ends.get(what, 0) + n

    def _turns(self) -> None:
        for turn in self.router.turns(self.now):
            hold = self.held.pop(turn.ticket)
            answer = self.intake.resume(hold, turn.verdict)
            if isinstance(turn.verdict, Route):
                assert isinstance(answer, Steer)
                self._steered(answer)
            else:
                self.tally.refused += 1

    def _sample(self) -> None:
        address = self.rng.choice(self.addresses)
        if self.rng.random() < 0.02:
            self.router.learn(NotSampled(POOL, address, self.rng.choice(list(ScrapeFailure))), self.now)
            return
        waiting = 40 if RATES[self._wave] == max(RATES) else 0
        sample = Sample(5, waiting, 0.5, 16, 20_000, self.now * 100, self.now * 10, self.now * 100, self.now * 50, 0.0)
        self.router.learn(Sampled(POOL, address, sample), self.now)

    @property
    def _wave(self) -> int:
        return self.tally.sent // WAVE % len(RATES)

    def _churn(self) -> None:
        """One replica leaves, one that was never there joins."""
        self.joined += 1
        gone = self.addresses.pop(self.rng.randrange(len(self.addresses)))
        self.router.learn(Remove(POOL, gone), self.now)
        address = f"10.{self.joined // 60000}.{self.joined // 250 % 240}.{self.joined % 250}:8000"
        self.addresses.append(address)
        self.router.learn(Add(POOL, Replica(address)), self.now)

    def finish(self) -> None:
        """Until nothing is under way. Raises AssertionError where a ledger is not at zero."""
        for _ in range(10_000):
            if not (self.due or self.held or self.router.in_flight):
                break
            self.now += 1.0
            self._happen()
            self._turns()
        assert not self.held, f"{len(self.held)} still held"
        assert self.router.in_flight == 0, self.router
        assert self.router.holding == 0, self.router
        self.router.check()
        tally = self.tally
        assert tally.sent == tally.steered + tally.refused + tally.left, tally
        assert sum(tally.ends.values()) == tally.steered, tally


def resident_mb() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def run(requests: int, seed: int = 1) -> dict[str, Any]:
    """Figures of one run."""
    soak, series, began = Soak(seed), [], time.perf_counter()
    for n in range(1, requests + 1):
        soak.step()
        if n % max(requests // 20, 1) == 0:
            gc.collect()
            series.append(round(resident_mb(), 1))
            print(f"{n:>9} requests  {series[-1]:>7} MB  {soak.router!r}"[:150], flush=True)
    soak.finish()
    warm = series[int(len(series) * WARM) - 1]
    return {
        "requests": requests,
        "seconds": round(time.perf_counter() - began, 1),
        "warm_mb": warm,
        "worst_mb": max(series[int(len(series) * WARM) - 1 :]),
        "growth": round(max(series[int(len(series) * WARM) - 1 :]) / warm, 4),
        "replicas_seen": soak.joined,
        **vars(soak.tally),
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    """What was missed."""
    if result["growth"] > GROWTH:
        yield f"memory grew by {result['growth'] - 1:.1%} after the warm-up, wanted {GROWTH - 1:.0%} at most"


def main() -> int:
    """0 when all held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    given = parser.parse_args()
    result = run(given.requests)
    Path("build").mkdir(exist_ok=True)
    Path("build/soak.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    missed = list(lines(result))
    print("\n".join(missed) or "memory flat, ledgers zero")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
