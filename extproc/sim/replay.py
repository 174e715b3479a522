"""What one engine would have made of requests that arrived when they did: the simulated engine, driven in virtual time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from extproc.sim.engine import Engine, EngineConfig, EngineRequest, RequestId


@dataclass(frozen=True, slots=True)
class Timed:
    """One request as an engine served it; seconds since any one moment."""

    prompt_tokens: int
    output_tokens: int
    arrived_s: float
    scheduled_s: float
    """The scheduler took it out of the queue; its prefill may begin a step later."""
    first_token_s: float
    last_token_s: float

    @property
    def queue_s(self) -> float:
        return self.scheduled_s - self.arrived_s

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def replay(requests: Sequence[Timed], config: EngineConfig) -> list[Timed]:
    """The same requests in the same order, with the times that the simulated engine gives them.

    No two share a prefix; one that was preempted finds its own. Raises ValueError for a request that the engine refuses.
    """
    engine = Engine(config)
    scheduled: dict[RequestId, float] = {}
    first: dict[RequestId, float] = {}
    last: dict[RequestId, float] = {}
    waiting = deque(_in_order_of_arrival(requests, config.block_size))
    now = -math.inf
    while True:
        while waiting and waiting[0][0] <= now:
            _add(engine, waiting.popleft()[1])
        step = engine.start_step()
        if step is None:
            if not waiting:
                break
            now = waiting[0][0]
            continue
        for i in step.admitted:
            scheduled.setdefault(i, now)  # it comes again after a preemption
        now += step.duration_s
        for token in engine.finish_step(step).edges:
            if token.first:
                first[token.id] = now
            if token.finished:
                last[token.id] = now
    return [
        replace(r, scheduled_s=scheduled[i], first_token_s=first[i], last_token_s=last[i])
        for i, r in enumerate(requests)
    ]


def _in_order_of_arrival(requests: Sequence[Timed], block_size: int) -> Iterator[tuple[float, EngineRequest]]:
    blocks = 0
    for i, r in sorted(enumerate(requests), key=lambda numbered: numbered[1].arrived_s):
        own = range(blocks, blocks + (r.prompt_tokens + r.output_tokens) // block_size)
        blocks = own.stop
        yield r.arrived_s, EngineRequest(i, r.prompt_tokens, r.output_tokens, own)


def _add(engine: Engine, request: EngineRequest) -> None:
    if refusal := engine.add(request):
        raise ValueError(f"request {request.id} could never run: {refusal}")
