"""The window where nobody waits: when its requests arrive, and what each costs at least.

The floor of a request is its own prefill, alone on the replica, with what an ideal cache holds of it: one cache (LRU) as large as
those of the fleet together, to which each request of the window has gone at once, in this order of arrivals. In a mixed fleet it
is the mean over work, each replica getting in proportion to its speed: a router can stay below that where load is light, by
leaving the slow ones alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec
from extproc.sim.traces import Trace, Turn


@dataclass(frozen=True, slots=True)
class Nominal:
    """One turn."""

    at_s: float
    """When it arrives."""
    floor_s: float
    """Its time to first token."""


def nominal(trace: Trace, nodes: Sequence[NodeSpec]) -> list[Nominal]:
    """For each turn of the trace, in its order."""
    engines = [node.engine for node in nodes]
    cache = IdealCache(sum(e.num_blocks * e.block_size for e in engines) // trace.block_size)
    followers: dict[int, list[int]] = defaultdict(list)
    for number, turn in enumerate(trace.turns):
        if turn.after is not None:
            followers[turn.after].append(number)
    coming = [(t.delay_s, number) for number, t in enumerate(trace.turns) if t.after is None]
    heapify(coming)
    found: dict[int, Nominal] = {}
    while coming:
        at, number = heappop(coming)
        turn = trace.turns[number]
        floor_s = _floor_s(turn, cache.serve(turn, trace.block_size), engines)
        found[number] = Nominal(at, floor_s)
        ended = at + floor_s + _over_work([_decode_s(e, turn) for e in engines])
        for follower in followers[number]:
            heappush(coming, (ended + trace.turns[follower].delay_s, follower))
    return [found[number] for number in range(len(trace.turns))]


@dataclass(slots=True)
class IdealCache:
    """One cache for all."""

    blocks: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Least recently used first."""

    def serve(self, turn: Turn, block_size: int) -> int:
        """Prompt tokens that were there; now all of the turn is. The last token is always computed, as in vLLM."""
        hashes = turn.hashes()
        hits = next((i for i, h in enumerate(hashes) if h not in self.held), len(hashes))
        for h in reversed(hashes):  # so that the head of the prompt is the last to go
            self.held[h] = None
            self.held.move_to_end(h)
        while len(self.held) > self.blocks:
            self.held.popitem(last=False)
        return min(hits, (turn.prompt_tokens - 1) // block_size) * block_size


def _floor_s(turn: Turn, cached: int, engines: Sequence[EngineConfig]) -> float:
    return _over_work([_prefill_s(e, turn.prompt_tokens - cached, cached) for e in engines])


def _prefill_s(engine: EngineConfig, uncached: int, cached: int) -> float:
    steps = math.ceil(uncached / engine.max_num_batched_tokens)
    gpu_s = engine.step_time.prefill_s(uncached, cached, engine.max_num_batched_tokens)
    return gpu_s + steps * engine.cpu_overhead_s


def _decode_s(engine: EngineConfig, turn: Turn) -> float:
    return turn.output_tokens * (engine.step_time.decode_step_s(1, turn.prompt_tokens) + engine.cpu_overhead_s)


def _over_work(times: Sequence[float]) -> float:
    """The harmonic mean: of equal jobs, a replica twice as fast does twice as many."""
    return len(times) / sum(1 / t for t in times)
