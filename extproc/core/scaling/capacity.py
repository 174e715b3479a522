"""What one replica does within its SLO, in requests of a given mix per second.

Two things end it:
 1. Its time. Prompts lengthen the steps that take them in by `fill_s`; an output token costs a step's time over the sequences
    that share it, as many as the KV cache, the engine's slots and the target for the time per output token allow. In a step
    model that is linear in its terms this sum is 1 exactly where the queue would grow for ever.
 2. The wait for a first token. Prefills are served one after the other, by `n` replicas from one queue (requests are held until
    one is free). The tail of that wait is exponential, as for M/G/n in heavy traffic, and the share that waits at all follows
    Sakasegawa (1977): rho ** (sqrt(2 (n + 1)) - 1). Large pools may therefore be used more than small ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from extproc.core.record import record
from extproc.core.scaling.arrivals import Mix
from extproc.core.scaling.settings import ScalingSettings

SLOTS: Final = 256
"""Sequences in a step, as far as the engine does not tell: vLLM's usual `max_num_seqs`."""
KV_SHARE: Final = 0.9
"""Of the KV cache in use: above it engines preempt."""
_STEPS: Final = 30
"""Halvings: to a billionth."""


@record
class ReplicaModel:
    """What a replica of the pool is, on average."""

    step_s: Callable[[float, float], float]
    """Seconds from one output token to the next as answers show them, of sequences and the KV tokens that they hold in all."""
    prefill_share: float
    """Of a replica's time that went into prompts meanwhile. It is in `step_s` already, and must not be paid for twice."""
    kv_tokens: float | None
    """Size of its KV cache; None where no engine has told."""
    base_s: float
    """What every first token pays besides prefill."""


def batch(model: ReplicaModel, mix: Mix, tpot_s: float) -> int:
    """Sequences that a replica can decode at a time: by its slots, its KV cache, and the time per output token. At least one."""
    context = mix.context_tokens / mix.output_tokens if mix.output_tokens else 0.0
    slots = SLOTS
    if model.kv_tokens and context:
        slots = min(slots, max(int(KV_SHARE * model.kv_tokens / context), 1))
    low, high = 1, slots
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if model.step_s(middle, middle * context) <= tpot_s else (low, middle - 1)
    return low


def decode_s(model: ReplicaModel, mix: Mix, tpot_s: float) -> float:
    """Seconds of a replica that the decode of the mix takes, at the batch that it can hold."""
    if not mix.output_tokens:
        return 0.0
    sequences = batch(model, mix, tpot_s)
    step_s = model.step_s(sequences, sequences * mix.context_tokens / mix.output_tokens)
    return mix.output_tokens * step_s * (1.0 - model.prefill_share) / sequences


def per_s(model: ReplicaModel, mix: Mix, replicas: int, settings: ScalingSettings) -> float:
    """Requests a second that each of so many replicas serves within the SLO. `mix`: means per request."""
    each_s = mix.fill_s + decode_s(model, mix, settings.tpot_target_s)
    if each_s <= 0:
        return math.inf
    high = settings.max_utilization / each_s
    if _late(model, mix, replicas, high, settings) <= 1.0 - settings.attainment:
        return high
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        in_time = _late(model, mix, replicas, middle, settings) <= 1.0 - settings.attainment
        low, high = (middle, high) if in_time else (low, middle)
    return max(low, _LEAST * settings.max_utilization / each_s)


_LEAST: Final = 0.2
"""Of its time a replica is used at least: a target that a lone prompt misses by itself is met by no number of replicas."""


def _late(model: ReplicaModel, mix: Mix, replicas: int, rate_per_s: float, settings: ScalingSettings) -> float:
    """Share of requests whose wait for their prefill is too long, at that rate for each replica."""
    mean_s, square_s2 = mix.prefill_s, mix.prefill_square_s2
    busy = rate_per_s * mean_s
    if busy >= 1.0:
        return 1.0
    if busy <= 0.0:
        return 0.0
    spread_s = math.sqrt(max(square_s2 - mean_s * mean_s, 0.0))
    left_s = max(settings.ttft_target_s - model.base_s - mean_s - spread_s, 0.1 * settings.ttft_target_s)
    waits = math.pow(busy, math.sqrt(2.0 * (replicas + 1)) - 1.0)
    # Mean wait of those that wait: (1 + cv^2) / 2 of a prefill, over what is idle of all replicas together.
    mean_wait_s = square_s2 / mean_s / 2.0 / (replicas * (1.0 - busy))
    return waits * math.exp(-left_s / mean_wait_s)


def needed(model: ReplicaModel, mix: Mix, rate_per_s: float, settings: ScalingSettings) -> int:
    """The least number of replicas that serve so many requests a second within the SLO; at most the pool's bound."""
    low, high = 1, settings.max_replicas
    while low < high:
        middle = (low + high) // 2
        if middle * per_s(model, mix, middle, settings) >= rate_per_s:
            high = middle
        else:
            low = middle + 1
    return low
