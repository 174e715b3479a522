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


def _bound(members: Sequence[Member], factor: float) -> int:
    """An affine replica takes one more while it has fewer than this in flight (bounded loads, Mirrokni et al., 2018)."""
    total = sum(len(m.load) for m in members) + 1
    return max(1, math.ceil(factor * total / len(members)))


def _spill(ranked: Ranked, bound: int, affine: str) -> Ranking:
    """Move candidates at the bound behind those below it, each group in its order."""
    below = [r for r in ranked if len(r[1].load) < bound]
    above = [r for r in ranked if len(r[1].load) >= bound]
    first_kept = bool(below) and below[0] is ranked[0]
    return Ranking(below + above, affine if first_kept or not below else "spill")


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
        return _spill(ranked, _bound(members, self.load_factor), "session")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"in_flight": float(len(member.load))}


@register
@dataclass(slots=True)
class PrefixAffinity(Stateless):
    """The replica with the longest cached prefix, while it is below the bound; then fewest requests in flight."""

    name = "prefix_affinity"
    load_factor: float = 1.5
    """A replica with the prefix may hold this many times the mean of requests in flight."""
    min_tokens: int = 64
    """Shorter matches do not count: nearly every chat shares a template's first tokens."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        by_load = order(ask, members, lambda m: float(len(m.load)), rng)
        # Sorting is stable: among equal matches, and among those without one, the fewest in flight come first.
        ranked = sorted(((self._score(ask, m), m) for _, m in by_load), key=lambda r: r[0])
        if ranked[0][0] == 0.0:
            return Ranking(by_load, "no_prefix")
        return _spill(ranked, _bound(members, self.load_factor), "prefix")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"cached_tokens": float(ask.cached_tokens(member)), "in_flight": float(len(member.load))}

    def _score(self, ask: Ask, member: Member) -> float:
        cached = ask.cached_tokens(member)
        return -float(cached) if cached >= self.min_tokens else 0.0
