"""Targets that share requests by weight, the same key always in the same order.

Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005, the logarithmic method): each target scores `ln(u) / weight`, u between 0
and 1 by a hash of target and key, and the highest goes first. The share of first places is the weight over the sum of all. Where one
weight grows, keys move to that target and between no others, and no more of them than the share grows by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from extproc.core.catalog.settings import Target

_SPAN = 2.0**64
_BELOW_ONE = 1.0 - 2.0**-53


class Group:
    """Targets with the same rule."""

    __slots__ = ("_seeds", "targets")

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self._seeds = tuple(map(_seed, self.targets))

    def ranked(self, key: bytes) -> list[Target]:
        """Those with a weight, best first for this key; further ones are where it goes while those before cannot serve it."""
        targets = self.targets
        scored = [
            (math.log(min((xxh3_64_intdigest(key, seed) + 0.5) / _SPAN, _BELOW_ONE)) / target.weight, i)
            for i, (target, seed) in enumerate(zip(targets, self._seeds, strict=True))
            if target.weight > 0
        ]
        return [targets[i] for _, i in sorted(scored, reverse=True)]


def _seed(target: Target) -> int:
    """By model too: sessions in the canary of one model shall not be those in the canary of every other. Not by version: a new label for
    the same target moves nobody.
    """
    return xxh3_64_intdigest(f"{target.model}\0{target.to}\0{target.engine}".encode())
