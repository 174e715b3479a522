"""SMG, the gateway that came out of the SGLang router: a hash of the prompt's head on a ring, within a bound on load."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from random import Random
from typing import Final

from xxhash import xxh3_64_intdigest

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Stateless, Terms
from extproc.core.prediction import Ask
from tests.bench.baselines.ties import first

BYTES_PER_TOKEN: Final = 4
"""Of text that nobody has tokenized: SMG's own rule of thumb."""
VIRTUAL_NODES: Final = 150
"""Points of each replica on the ring."""
_score = itemgetter(0)


@lru_cache(maxsize=64)
def _ring(addresses: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Points in rising order, and the place in `addresses` of each one's replica."""
    points = sorted(
        (xxh3_64_intdigest(f"{address}#{i}".encode()), place)
        for place, address in enumerate(addresses)
        for i in range(VIRTUAL_NODES)
    )
    return [point for point, _ in points], [place for _, place in points]


def owner(key: int, addresses: tuple[str, ...]) -> int:
    """Place in `addresses` of the replica whose point follows the key's on the ring."""
    points, places = _ring(addresses)
    return places[bisect_right(points, xxh3_64_intdigest(f"{key:016x}".encode())) % len(places)]


@dataclass(slots=True)
class SmgPrefixHash(Stateless):
    """`prefix_hash` of SMG 1.13: the replica that follows the hash of the first 256 tokens on the ring, unless overloaded.

    Overloaded is one with more requests in flight than both `load_factor` times the mean and `balance_abs_threshold` above
    it, where the mean counts the new request. Then the least loaded takes it, the first of equals.

    Simplified: the head is cut at the last block that ends within 256 tokens, or at the first block if none does. A prompt
    shorter than a block has no hash, so it goes to the least loaded. The ring uses XXH3 where SMG has BLAKE3.
    """

    name = "smg_prefix_hash"
    prefix_tokens: int = 256
    """Of the head that is hashed."""
    load_factor: float = 1.25
    balance_abs_threshold: int = 10
    """Requests above the mean."""

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        ranked: Ranked = [(float(len(m.load)), m) for m in members]
        bound = self._bound(ranked)
        ranked.sort(key=_score)  # stable: the first of equals stays first
        key = self._key(ask)
        if key is None:
            return Ranking(ranked, "no_prefix")
        home = members[owner(key, tuple(m.replica.address for m in members))]
        if len(home.load) > bound:
            return Ranking(ranked, "spill")
        return Ranking(first(home, ranked), "ring")

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"in_flight": float(len(member.load))}

    def _bound(self, loads: Ranked) -> float:
        """Most requests in flight with which a replica still takes one more."""
        mean = (sum(n for n, _ in loads) + 1) / len(loads)
        return max(self.load_factor * mean, mean + self.balance_abs_threshold)

    def _key(self, ask: Ask) -> int | None:
        blocks = ask.request.blocks
        if not blocks.hashes:
            return None
        return blocks.hashes[max(bisect_right(blocks.ends, self.prefix_tokens * BYTES_PER_TOKEN) - 1, 0)]
