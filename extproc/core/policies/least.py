"""Policies that take the least of one measure.

A measure that is not known is not zero: such a replica stands behind every one whose measure is known, and those without
are ordered by our own requests in flight there, so that a fleet without samples is still balanced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranking, Stateless, Terms, order, register
from extproc.core.prediction import Ask

_UNKNOWN = 1e12
"""Above every measure; in-flight requests are added."""
_KV_TOKENS = 400_000
"""Assumed where the engine does not tell its KV cache's size: an 8B model on one 80 GB GPU."""


class _Least(Stateless):
    """Order by `measure`, unknown last."""

    __slots__ = ()
    measured = ""

    def measure(self, member: Member, now: float) -> float | None:
        raise NotImplementedError

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        def score(member: Member) -> float:
            value = self.measure(member, now)
            return _UNKNOWN + len(member.load) if value is None else value

        ranked = order(ask, members, score, rng)
        return Ranking(ranked, "least" if ranked[0][0] < _UNKNOWN else "unknown")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {self.measured: self.measure(member, now), "in_flight": float(len(member.load))}


@register
@dataclass(slots=True)
class LeastRequest(_Least):
    """Fewest requests in flight, by our own ledger."""

    name = "least_request"
    measured = "in_flight"

    def measure(self, member: Member, now: float) -> float | None:
        return float(len(member.load))


@register
@dataclass(slots=True)
class LeastQueue(_Least):
    """Shortest queue in the engine (`vllm:num_requests_waiting`), with what was sent there since that sample."""

    name = "least_queue"
    measured = "waiting"

    def measure(self, member: Member, now: float) -> float | None:
        queued = member.queued(now)
        # Without the second term every arrival between two samples would go to the same replica.
        return None if queued is None else queued + 1e-3 * len(member.load)


@register
@dataclass(slots=True)
class LeastKv(_Least):
    """Least KV cache in use, with the prompts sent there since the sample."""

    name = "least_kv"
    measured = "kv_usage"

    def measure(self, member: Member, now: float) -> float | None:
        sample = member.fresh(now)
        if sample is None or sample.kv_usage is None:
            return None
        sent = member.load.held_tokens - member.held_at_sample
        return max(sample.kv_usage + sent / (sample.kv_capacity_tokens or _KV_TOKENS), 0.0)


@register
@dataclass(slots=True)
class GpuUtilization(_Least):
    """Least used GPUs, by a DCGM exporter or NVML (`pools[].gpu`), with what was sent there since they were looked at.

    A GPU counts as used while anything runs on it, be it one sequence or a hundred: this tells idle from busy, and little else.
    """

    name = "gpu_utilization"
    measured = "gpu_use"
    per_request: float = 0.05
    """Use that one more request counts for until the GPUs are looked at again. 0: all that comes in between goes to the same replica."""

    def __post_init__(self) -> None:
        if not 0 <= self.per_request <= 1:
            raise ValueError(f"per_request must be from 0 to 1, not {self.per_request!r}")

    def measure(self, member: Member, now: float) -> float | None:
        use = member.gpu_use(now)
        if use is None:
            return None
        since = max(len(member.load) - member.opened_at_gpu, 0)
        return use + self.per_request * since + 1e-3 * len(member.load)  # as much used: fewer requests


@register
@dataclass(slots=True)
class LeastLatency(_Least):
    """Lowest moving average of response times (peak EWMA: times the requests in flight), for mixed GPU types."""

    name = "least_latency"
    measured = "latency_s"
    fade_s: float = 60.0
    """Seconds without an answer after which an average counts for a third: a replica that was slow once is tried again."""

    def __post_init__(self) -> None:
        if not self.fade_s > 0:
            raise ValueError(f"fade_s must be above 0, not {self.fade_s!r}")

    def measure(self, member: Member, now: float) -> float | None:
        if member.latency_s is None:
            return None
        # Only while idle: a replica that is working on something slow has no answer to show for it yet.
        idle_s = 0.0 if len(member.load) else now - member.answered_at
        return member.latency_s * (len(member.load) + 1) * math.exp(-idle_s / self.fade_s)

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        """A replica that has answered nothing yet goes first while it is idle: it would never be measured otherwise."""
        untried = [m for m in members if m.latency_s is None and not len(m.load)]
        if not untried:
            return _Least.rank(self, ask, members, now, rng)
        rest = [m for m in members if m.latency_s is not None or len(m.load)]
        ranked = order(ask, untried, lambda m: 0.0, rng)
        return Ranking(ranked + (_Least.rank(self, ask, rest, now, rng).order if rest else []), "untried")


@register
@dataclass(slots=True)
class PowerOfTwo(Stateless):
    """The less loaded of two drawn at random (Mitzenmacher, 2001)."""

    name = "power_of_two"

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        drawn = rng.sample(list(members), min(2, len(members)))
        rest = [m for m in members if m not in drawn]
        ranked = order(ask, drawn, lambda m: float(len(m.load)), rng)
        if rest:
            ranked += order(ask, rest, lambda m: float(len(m.load)), rng)
        return Ranking(ranked, "two")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"in_flight": float(len(member.load))}
