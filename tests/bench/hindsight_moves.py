"""Which change of an assignment to try next: at random, but mostly where something can be gained.

move    one request, the likelier the longer its first token takes, to any other replica
swap    the same with one that arrived about then and runs elsewhere
join    one request whose prefix was computed elsewhere but not found here, to where the last that shared it went; every
        other time with those of its descendants that run beside it, for they hit what it leaves in the cache
family  one request and its descendants on the same replica, to any other: moving a single one of them could never pay
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Final

from tests.bench.hindsight_fleet import Move, Placement, Problem

SHARES: Final = {"move": 0.4, "swap": 0.4, "join": 0.1, "family": 0.1}
"""How often each is proposed. Without the last two the search ended 1.2 % higher (conversation, 2.2 times as fast)."""
NEIGHBOURS: Final = 12
"""Arrivals before and after, among which a partner for a swap is drawn."""
HORIZONS_S: Final = (1.5, 4.0, 16.0)
"""How far a proposal is followed before the next look whether it is hopeless. Most are after the first."""
FLOOR_S: Final = 0.02
"""Weight of a request that is served at once, or is not scored: it may be in the way of others."""
KIN_TOKENS: Final = 1024
"""A shorter common prefix does not make kin: all requests may share a system prompt."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Moves to be made together."""

    kind: str
    moves: tuple[Move, ...]
    horizons_s: Sequence[float] = HORIZONS_S
    """Where to look before the end; what pays by later cache hits must not be judged early."""


@dataclass(frozen=True, slots=True)
class Kinship:
    """Who shares a prefix with whom."""

    parents: tuple[int | None, ...]
    """The last request before with the longest prefix in common, by rank; None where it shares none."""
    shared: tuple[int, ...]
    """What of the prompt can be cached by that, tokens: full blocks, and never the last token."""
    children: tuple[tuple[int, ...], ...]
    """By parent, where the prefix is at least `KIN_TOKENS` long."""

    @classmethod
    def of(cls, problem: Problem) -> Kinship:
        """Of the requests of a trace, prompts and known outputs alike."""
        last: dict[int, int] = {}
        parents: list[int | None] = []
        shared: list[int] = []
        children: list[list[int]] = [[] for _ in problem.arrivals]
        size = problem.configs[0].block_size
        for rank, arrival in enumerate(problem.arrivals):
            parent, tokens = _closest(last, arrival.request.hashes, size)
            tokens = min(tokens, (arrival.request.prompt_tokens - 1) // size * size)
            parents.append(parent)
            shared.append(tokens)
            if parent is not None and tokens >= KIN_TOKENS:
                children[parent].append(rank)
            last.update(dict.fromkeys(arrival.request.hashes, rank))
        return cls(tuple(parents), tuple(shared), tuple(map(tuple, children)))

    def line(self, rank: int) -> list[int]:
        """A request and its descendants."""
        line = [rank]
        for each in line:
            line += self.children[each]
        return line


def _closest(last: dict[int, int], hashes: Sequence[int], block_size: int) -> tuple[int | None, int]:
    """Who had the longest head of these hashes last, and the length of the head in tokens."""
    parent, blocks = None, 0
    for h in hashes:
        if h not in last:
            break
        parent, blocks = last[h], blocks + 1
    return parent, blocks * block_size


class Proposer:
    """Draws proposals; call `look` after the placement has changed."""

    def __init__(self, placement: Placement, rng: Random) -> None:
        self._placement, self._rng = placement, rng
        self._kin = Kinship.of(placement.problem)
        self._shares = list(accumulate(SHARES.values()))
        self.look()

    def look(self) -> None:
        """Weigh the requests by how long they wait, as far as they are scored, and by what they compute again."""
        placement, problem = self._placement, self._placement.problem
        moments = zip(problem.weights, placement.first_s, problem.arrivals, strict=True)
        waits = (weight * (first_s - arrival.at_s) for weight, first_s, arrival in moments)
        self._slow = list(accumulate(max(wait_s, FLOOR_S) for wait_s in waits))
        missed = (shared - hit for shared, hit in zip(self._kin.shared, placement.cached, strict=True))
        self._missing = list(accumulate(max(tokens, 0) + 1e-9 for tokens in missed))

    def draw(self) -> Proposal:
        """The next to try; a kind that has nothing to offer gives way to a plain move."""
        kind = self._rng.choices(list(SHARES), cum_weights=self._shares)[0]
        makers = {"swap": self._swap, "join": self._join, "family": self._family}
        made = makers[kind]() if kind in makers else None
        return made or self._move()

    def _pick(self, weights: Sequence[float]) -> int:
        return self._rng.choices(range(len(weights)), cum_weights=weights)[0]

    def _elsewhere(self, rank: int) -> int:
        to = self._rng.randrange(len(self._placement.queues) - 1)
        return to + (to >= self._placement.places[rank])

    def _move(self) -> Proposal:
        rank = self._pick(self._slow)
        return Proposal("move", ((rank, self._elsewhere(rank)),))

    def _swap(self) -> Proposal | None:
        places, rank = self._placement.places, self._pick(self._slow)
        other = min(max(rank + self._rng.randint(-NEIGHBOURS, NEIGHBOURS), 0), len(places) - 1)
        if places[rank] == places[other]:
            return None
        return Proposal("swap", ((rank, places[other]), (other, places[rank])))

    def _join(self) -> Proposal | None:
        places, rank = self._placement.places, self._pick(self._missing)
        parent = self._kin.parents[rank]
        if parent is None or places[parent] == places[rank]:
            return None
        if self._rng.random() < 0.5:
            return Proposal("join", ((rank, places[parent]),), HORIZONS_S[1:])
        return Proposal("join", self._together(rank, places[parent]), ())

    def _family(self) -> Proposal | None:
        rank = self._pick(self._missing if self._rng.random() < 0.5 else self._slow)
        parent = self._kin.parents[rank]
        if parent is not None and self._rng.random() < 0.5:
            rank = parent
        moves = self._together(rank, self._elsewhere(rank))
        return Proposal("family", moves, ()) if len(moves) > 1 else None

    def _together(self, rank: int, to: int) -> tuple[Move, ...]:
        """It and those of its descendants that are on the same replica."""
        places = self._placement.places
        return tuple((each, to) for each in self._kin.line(rank) if places[each] == places[rank])
