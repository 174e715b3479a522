"""What the comparison with real vLLM asks: requests, their replicas, their order, and their tokens. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final, TypeAlias

from extproc.core.types import Replica
from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.engine import EngineConfig
from extproc.sim.node import NodeSpec
from extproc.sim.traces import Generate, Trace, generate
from extproc.sim.traces.base import head

SESSIONS: Final = Generate(
    sessions=120,
    sessions_per_s=4.0,
    turns=3.0,
    think_s=1.0,
    tenants=3,
    groups=2,
    system_tokens=500,
    user_tokens=120,
    user_sigma=0.7,
    output_tokens=40,
    output_sigma=0.6,
    max_tokens=2000,
    siblings=4,
)
"""Far more than fits into a cache of 200 blocks of 32 tokens, and each request at most a third of that."""
ASKED_AGAIN: Final = 8
"""Every so many turns one has a prompt of whole blocks, and is sent twice."""
AGAIN_AFTER_S: Final = 0.5
SMALLEST_TOKEN: Final = 10
VOCABULARY: Final = 4096
"""Of the small model; the first few tokens have a meaning of their own."""

Tokens: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; what it says is known when those before it have been answered."""

    replica: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    """Ids of the full blocks of the prompt, then of the answer. Equal id, equal tokens up to its end."""
    after: tuple[int, ...] = ()
    """Places of those that must have ended."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All requests in the order in which they are sent."""

    asks: tuple[Ask, ...]
    first: int
    """Place of the first that counts; those before it only fill the caches."""
    replicas: int

    @property
    def scored(self) -> range:
        return range(self.first, len(self.asks))


def plan(config: EngineConfig, replicas: int, seed: int, sessions: Generate = SESSIONS) -> Plan:
    """The workload, routed. Raises ValueError where a request is too long for the engine."""
    trace = asked_again(generate(sessions.model_copy(update={"block_size": config.block_size}), seed))
    fleet = tuple(NodeSpec(Replica(f"10.0.0.{i}:8000"), config) for i in range(1, replicas + 1))
    served = sorted(Cluster(Scenario(trace, fleet, seed=seed), "predicted").run().served, key=lambda s: s.arrived_s)
    places = {s.turn: place for place, s in enumerate(served)}
    number = {spec.replica.address: i for i, spec in enumerate(fleet)}
    asks = []
    for s in served:
        if s.status != 200 or s.replica is None:
            raise ValueError(f"turn {s.turn} got {s.status} in the simulation: is it too long?")
        turn = trace.turns[s.turn]
        after = () if turn.after is None else (places[turn.after],)
        asks.append(Ask(number[s.replica], turn.prompt_tokens, turn.output_tokens, turn.hashes(), after))
    return behind(filling(config, replicas), asks, replicas)


def asked_again(trace: Trace) -> Trace:
    """The trace with some prompts cut to whole blocks and asked a second time: all of it is cached but the last block, which is computed again."""
    size, turns, again = trace.block_size, list(trace.turns), []
    for i in range(0, len(turns), ASKED_AGAIN):
        tokens = turns[i].prompt_tokens // size * size or size
        blocks = head(turns[i].runs, (tokens + turns[i].output_tokens) // size)
        turns[i] = replace(turns[i], prompt_tokens=tokens, runs=blocks)
        again.append(replace(turns[i], after=i, delay_s=AGAIN_AFTER_S))
    return replace(trace, turns=(*turns, *again))


def filling(config: EngineConfig, replicas: int) -> list[Ask]:
    """Prompts that together take every block of each replica once; their ids are negative, so nobody else's."""
    longest = min(config.max_model_len // config.block_size, config.num_blocks) - 1
    asks: list[Ask] = []
    for replica in range(replicas):
        after: tuple[int, ...] = ()
        for _ in range(-(-config.num_blocks // longest)):
            ids = tuple(range(-(len(asks) + 1) * longest, -len(asks) * longest))
            asks.append(Ask(replica, longest * config.block_size, 1, ids, after))
            after = (len(asks) - 1,)
    return asks


def behind(before: Sequence[Ask], asks: Sequence[Ask], replicas: int) -> Plan:
    """Both as one plan: the first of `asks` on a replica waits until all of `before` have ended."""
    shift, waiting = len(before), set(range(replicas))
    moved = []
    for ask in asks:
        after = tuple(place + shift for place in ask.after)
        if ask.replica in waiting:
            waiting.remove(ask.replica)
            after += tuple(range(shift))
        moved.append(replace(ask, after=after))
    return Plan((*before, *moved), shift, replicas)


class Dispatch:
    """Who is sent next, in reality as in the simulation: each replica's requests in order, so many at a time at most."""

    def __init__(self, plan: Plan, at_once: int) -> None:
        self._asks = plan.asks
        self._queues: list[deque[int]] = [deque() for _ in range(plan.replicas)]
        for place, ask in enumerate(plan.asks):
            self._queues[ask.replica].append(place)
        self._free = [at_once] * plan.replicas
        self._ended: set[int] = set()

    def __repr__(self) -> str:
        return f"<dispatch {len(self._ended)}/{len(self._asks)} ended>"

    def take(self) -> list[int]:
        """Places of those that go now."""
        taken = []
        for replica, queue in enumerate(self._queues):
            while queue and self._free[replica] and self._ended.issuperset(self._asks[queue[0]].after):
                self._free[replica] -= 1
                taken.append(queue.popleft())
        return taken

    def end(self, place: int) -> None:
        """This one was answered."""
        self._ended.add(place)
        self._free[self._asks[place].replica] += 1


class Content:
    """Tokens of blocks, from their ids: random at first, and those of an answer as soon as it is there."""

    def __init__(self, block_size: int, seed: int) -> None:
        self._size, self._seed = block_size, seed
        self._known: dict[int, tuple[int, ...]] = {}

    def prompt(self, ask: Ask, place: int) -> list[int]:
        """All tokens of the prompt; what does not fill a block is like no other."""
        full, rest = divmod(ask.prompt_tokens, self._size)
        tokens = [token for block in ask.blocks[:full] for token in self._block(block)]
        return tokens + self._random(f"end of {place}", rest)

    def answered(self, ask: Ask, tokens: Tokens) -> None:
        """Prompt and answer, as a later turn will repeat them."""
        for i, block in enumerate(ask.blocks):
            self._known.setdefault(block, tuple(tokens[i * self._size : (i + 1) * self._size]))

    def _block(self, block: int) -> tuple[int, ...]:
        if block not in self._known:
            self._known[block] = tuple(self._random(str(block), self._size))
        return self._known[block]

    def _random(self, name: str, count: int) -> list[int]:
        return Random(f"{self._seed}/{name}").choices(range(SMALLEST_TOKEN, VOCABULARY), k=count)


def chained(tokens: Tokens, block_size: int) -> tuple[int, ...]:
    """A hash for each full block, over it and all before it."""
    hashes: list[int] = []
    for i in range(0, len(tokens) - block_size + 1, block_size):
        hashes.append(hash((hashes[-1] if hashes else 0, tuple(tokens[i : i + block_size]))))
    return tuple(hashes)
