"""Policies that keep like with like, within a bound on load.

The bound is per candidate: a replica above it is passed over for this request. A gate for the whole fleet ("imbalanced:
forget affinity") would let one hot replica turn affinity off for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from xxhash import xxh3_64_intdigest

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Stateless, Terms, order, register, rendezvous
from extproc.core.prediction import Ask

AT_EASE = 4
"""Requests in flight up to which affinity is never given up: an engine that batches runs four about as fast as one (8B on an
H100: 6.2 ms a step for one sequence, 9.6 for 32). With a bound of the mean alone, a nearly idle fleet would scatter every
second request of a session."""


def _bound(members: Sequence[Member], factor: float) -> int:
    """An affine replica takes one more while it has fewer than this in flight (bounded loads, Mirrokni et al., 2018)."""
    total = sum(len(m.load) for m in members) + 1
    return max(AT_EASE, math.ceil(factor * total / len(members)))


@register
@dataclass(slots=True)
class SessionAffinity(Stateless):
    """A session stays on one replica by consistent hashing, and goes to its next one while that is above the bound.

    Without a session id the prompt's head stands in for it; without that, fewest requests in flight.
    """

    name = "session_affinity"
    load_factor: float = 1.25
    """An affine replica may hold this many times the mean of requests in flight."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        session = ask.request.session
        key = xxh3_64_intdigest(session.encode()) if session is not None else ask.tie_key
        if key is None:
            return Ranking(order(ask, members, lambda m: float(len(m.load)), rng), "no_session")
        ranked = [(-float(rendezvous(key, m.address)), m) for m in members]
        ranked.sort(key=lambda r: r[0])
        home, bound = ranked[0], _bound(members, self.load_factor)
        ranked.sort(key=lambda r: len(r[1].load) >= bound)  # stable: each group keeps its order
        return Ranking(ranked, "session" if ranked[0] is home else "spill")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"in_flight": float(len(member.load))}


@register
@dataclass(slots=True)
class PrefixAffinity(Stateless):
    """The replica with the longest cached prefix, while it is below the bound; then fewest requests in flight."""

    name = "prefix_affinity"
    load_factor: float = 1.5
    """A replica with the prefix may hold this many times the mean of requests in flight."""
    min_share: float = 0.3
    """A match of less than this share of the prompt does not count: a short prefix common to all would draw everything to its first holders, and leave the others without work. The cache-aware routers of SGLang and vLLM have the same default."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        bound = _bound(members, self.load_factor)
        scored = [(len(m.load) >= bound, self._score(ask, m), m) for m in members]
        longest = min(score for _, score, _ in scored)
        if longest == 0.0:
            return Ranking(order(ask, members, lambda m: float(len(m.load)), rng), "no_prefix")
        above, nearest = min((above, score) for above, score, _ in scored)
        level = [m for a, s, m in scored if (a, s) == (above, nearest)]
        rest = [r for r in scored if r[:2] != (above, nearest)]
        rest.sort(key=lambda r: (r[0], r[1], len(r[2].load)))
        chosen: Ranked = [(nearest, m) for _, m in order(ask, level, lambda m: float(len(m.load)), rng)]
        return Ranking(chosen + [(s, m) for _, s, m in rest], "prefix" if nearest == longest else "spill")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"cached_tokens": float(ask.cached_tokens(member)), "in_flight": float(len(member.load))}

    def _score(self, ask: Ask, member: Member) -> float:
        cached = ask.cached_tokens(member)
        return -float(cached) if cached >= self.min_share * ask.prompt_tokens else 0.0
