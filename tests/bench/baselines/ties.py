"""Least score first, the best place by lot among equals: how most of the systems break ties."""

from __future__ import annotations

from operator import itemgetter
from random import Random
from typing import TypeVar

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked

K = TypeVar("K", float, tuple[int, int])
_key = itemgetter(0)


def least(scored: list[tuple[K, Member]], rng: Random) -> list[tuple[K, Member]]:
    """Sort in place; of those exactly equal to the best, one drawn with equal chance comes first. At least one is given."""
    scored.sort(key=_key)
    best, level = scored[0][0], 1
    while level < len(scored) and scored[level][0] == best:
        level += 1
    if level > 1:
        drawn = rng.randrange(level)
        scored[0], scored[drawn] = scored[drawn], scored[0]
    return scored


def first(chosen: Member, ranked: Ranked) -> Ranked:
    """Move one to the front, in place."""
    place = next(i for i, (_, m) in enumerate(ranked) if m is chosen)
    ranked.insert(0, ranked.pop(place))
    return ranked
