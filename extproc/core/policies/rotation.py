"""Policies that look at no load: turns, chance, and shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranking, Stateless, Terms, register
from extproc.core.prediction import Ask


@register
@dataclass(slots=True)
class RoundRobin:
    """Each in turn. For uniform requests; skews when output lengths vary."""

    name = "round_robin"
    _last: str | None = field(default=None, init=False)

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        addresses = [m.address for m in members]
        first = addresses.index(self._last) + 1 if self._last in addresses else 0
        turned = [*members[first:], *members[:first]]
        return Ranking([(float(i), m) for i, m in enumerate(turned)], "turn")

    def took(self, ask: Ask, member: Member) -> None:
        self._last = member.address

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {}


@register
@dataclass(slots=True)
class Random_(Stateless):  # noqa: N801 - the trailing underscore keeps random.Random visible
    """Any, with equal chance."""

    name = "random"

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        shuffled = list(members)
        rng.shuffle(shuffled)
        return Ranking([(float(i), m) for i, m in enumerate(shuffled)], "chance")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {}


@register
@dataclass(slots=True)
class Weighted:
    """Shares of traffic by capacity: smooth weighted round robin, so that a heavy replica's turns are spread out."""

    name = "weighted"
    by: str = "weight"
    """`weight`: the replica's configured weight. `free_capacity`: 1 - KV cache use, where sampled."""
    _credit: dict[str, float] = field(default_factory=dict, init=False)
    _shares: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.by not in ("weight", "free_capacity"):
            raise ValueError(f"by must be weight or free_capacity, not {self.by!r}")

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        self._shares = {m.address: self._share(m, now) for m in members}
        ranked = [(-(self._credit.get(m.address, 0.0) + self._shares[m.address]), m) for m in members]
        ranked.sort(key=lambda r: r[0])
        return Ranking(ranked, "share")

    def took(self, ask: Ask, member: Member) -> None:
        total = sum(self._shares.values())
        # Only replicas of the last ranking keep credit: one that left, or was unready, does not save up turns.
        self._credit = {a: self._credit.get(a, 0.0) + share for a, share in self._shares.items()}
        self._credit[member.address] -= total

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"share": self._share(member, now), "credit": self._credit.get(member.address, 0.0)}

    def _share(self, member: Member, now: float) -> float:
        if self.by == "free_capacity":
            sample = member.fresh(now)
            # Unknown is not free: without a sample the replica gets the share of one that is half full.
            usage = sample.kv_usage if sample and sample.kv_usage is not None else 0.5
            return member.replica.weight * max(1.0 - usage, 0.01)
        return member.replica.weight
