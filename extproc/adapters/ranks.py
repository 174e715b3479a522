"""Between those who know replicas by their address and the core, where each data parallel rank is a replica: changes and facts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from extproc.core.ranks import expanded, members_at
from extproc.core.types import (
    Add,
    Change,
    Fact,
    GpuSampled,
    Identified,
    NotSampled,
    Probed,
    Remove,
    Reset,
    Serves,
)

_OF_ALL: Final = (NotSampled, Identified, Serves, Probed, GpuSampled)
"""Facts on a server that hold for each engine behind it."""


class Ranks:
    """How many ranks the replicas of each pool have."""

    def __init__(self, of_pool: Mapping[str, int]) -> None:
        """By name of the pool; those with one rank are left as they are."""
        self._of_pool = {pool: ranks for pool, ranks in of_pool.items() if ranks > 1}

    def members(self, pool: str, address: str) -> tuple[str, ...]:
        """What the core calls the engines at an address."""
        return members_at(address, self._of_pool.get(pool, 1))

    def change(self, change: Change) -> tuple[Change, ...]:
        """The same for each rank."""
        ranks = self._of_pool.get(change.pool)
        if ranks is None:
            return (change,)
        match change:
            case Reset(pool=pool, replicas=replicas):
                return (Reset(pool, expanded(replicas, ranks)),)
            case Add(pool=pool, replica=replica):
                return tuple(Add(pool, each) for each in expanded((replica,), ranks))
            case Remove(pool=pool, address=address):
                return tuple(Remove(pool, name) for name in members_at(address, ranks))

    def fact(self, fact: Fact) -> tuple[Fact, ...]:
        """The same for each rank, where it is on all of them and does not name one already."""
        if not self._of_pool or not isinstance(fact, _OF_ALL) or "/" in fact.address:
            return (fact,)
        return tuple(replace(fact, address=name) for name in self.members(fact.pool, fact.address))
