"""AIBrix, the gateway plug-in for Envoy: prefix match first, among pods that are not too busy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Stateless, Terms
from extproc.core.prediction import Ask
from tests.bench.baselines.ties import first, least


def _percent(ask: Ask, member: Member) -> int:
    """Of the prompt, matched there: whole per cent, as AIBrix counts; 0 may be a short match."""
    return int(100.0 * ask.hit_tokens.get(member.replica.address, 0.0) / ask.prompt_tokens + 1e-6)


def _busy(counts: Sequence[int], factor: float) -> float:
    """Mean of the counts and `factor` sample standard deviations."""
    mean = sum(counts) / len(counts)
    if len(counts) == 1:
        return mean
    return mean + factor * math.sqrt(sum((n - mean) ** 2 for n in counts) / (len(counts) - 1))


@dataclass(slots=True)
class AibrixPrefixCache(Stateless):
    """`prefix-cache` of AIBrix: the longest match among pods with at most mean + 1 sigma requests in flight.

    1. If max - min > 8 requests in flight, only pods with the minimum are looked at for a match.
    2. Of those with a match and not too busy: the highest per cent, then the fewest requests, then by lot.
    3. If there is none, the fewest requests of all, by lot among equals.

    Simplified: the match is our index's. The table of AIBrix has 200,000 blocks of 4 characters for all pods together,
    which is 200,000 tokens, and forgets after 20 minutes. Later versions also ask for max > 2 x (mean + 1) in step 1 and
    let a gap of 8 do: `imbalance_gap=7, imbalance_factor=2`.
    """

    name = "aibrix_prefix_cache"
    imbalance_gap: int = 8
    """Requests between the busiest and the idlest pod above which step 1 applies."""
    imbalance_factor: float = 0.0
    """And only if the busiest has more than this many times the mean and one; 0 does not ask."""
    deviations: float = 1.0
    """A pod with more than the mean and so many standard deviations is too busy."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        counts = [len(m.load) for m in members]
        ranked: Ranked = least([(float(n), m) for n, m in zip(counts, members, strict=True)], rng)
        if not ask.hit_tokens:
            return Ranking(ranked, "no_match")
        limit = _busy(counts, self.deviations)
        if self._imbalanced(counts):
            limit = min(limit, min(counts))
        matched = [
            ((-_percent(ask, m), n), m)
            for n, m in zip(counts, members, strict=True)
            if n <= limit and m.replica.address in ask.hit_tokens
        ]
        if not matched:
            return Ranking(ranked, "no_match")
        return Ranking(first(least(matched, rng)[0][1], ranked), "match")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"matched_percent": float(_percent(ask, member)), "in_flight": float(len(member.load))}

    def _imbalanced(self, counts: Sequence[int]) -> bool:
        busiest = max(counts)
        if busiest - min(counts) <= self.imbalance_gap:
            return False
        return busiest > self.imbalance_factor * (sum(counts) / len(counts) + 1)
