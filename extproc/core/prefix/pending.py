"""Prompts that replicas have been sent and have not told of: their blocks will be there, though no event has said so yet.

An engine tells of a block when it has computed it, and the telling takes time. Until then the exact index would send the second
request of a burst elsewhere, away from what the first brings (`docs/predicted.md` has figures). While a request is open its blocks
cannot be evicted either, so it counts until it ends.

A long prompt has thousands of blocks, so a prompt is filed under some of its hashes only, the anchors: the first ones, then each a
quarter further on. Under the last anchor that two prompts share, their chains are compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from extproc.core.prefix.exact import MAX_UNITS

MAX_OPEN: Final = 20_000
"""Prompts kept; further ones are left out, and then only the engine's own events tell of them."""
LATEST: Final = 4
"""Prompts of a replica that are looked at under an anchor, the last ones: more tell little, and all would cost with each request."""


def _anchors() -> Iterator[int]:
    count = 1
    while count <= MAX_UNITS:
        yield count
        count += max(count // 4, 1)


ANCHORS: Final = tuple(_anchors())
"""Numbers of leading blocks under whose hash a prompt is filed."""

Chain = Sequence[int]


@dataclass(slots=True)
class _Open:
    """One prompt."""

    address: str
    chain: Chain


class Pending:
    """Replica -> prompts on their way there. Sizes are units, blocks of `exact.UNIT` tokens."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._filed: dict[int, dict[str, dict[str, Chain]]] = {}
        """Hash at an anchor -> replica -> flight -> chain"""

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<pending {len(self._open)} prompts>"

    def insert(self, flight: str, address: str, chain: Chain) -> None:
        """The replica was sent a prompt with these hashes."""
        if not chain or len(self._open) >= MAX_OPEN:
            return
        self._open[flight] = _Open(address, chain)
        for count in _leading(chain):
            self._filed.setdefault(chain[count - 1], {}).setdefault(address, {})[flight] = chain

    def remove(self, flight: str) -> None:
        """It ended. Flights that are not here change nothing."""
        opened = self._open.pop(flight, None)
        if opened is None:
            return
        for count in _leading(opened.chain):
            digest = opened.chain[count - 1]
            by_replica = self._filed[digest]
            flights = by_replica[opened.address]
            del flights[flight]
            if not flights:
                del by_replica[opened.address]
                if not by_replica:
                    del self._filed[digest]

    def move(self, flight: str, address: str) -> None:
        """Another replica has it now."""
        if (opened := self._open.get(flight)) is not None:
            self.remove(flight)
            self.insert(flight, address, opened.chain)

    def clear(self, address: str) -> None:
        """The replica lost all that it had: it restarted, or left."""
        for flight in [flight for flight, opened in self._open.items() if opened.address == address]:
            self.remove(flight)

    def extend(self, chain: Chain, known: Mapping[str, int]) -> dict[str, int]:
        """Replica -> leading units that it will hold, for those that will hold more than is `known` of them."""
        if not chain or chain[0] not in self._filed:
            return {}
        found: dict[str, int] = {}
        seen: set[str] = set()
        for count in reversed(list(self._shared(chain))):
            for address, flights in self._filed[chain[count - 1]].items():
                if address in seen:
                    continue
                seen.add(address)
                least = known.get(address, 0)
                most = max(
                    _common(chain, other, max(least, count)) for other in islice(reversed(flights.values()), LATEST)
                )
                if most > least:
                    found[address] = most
        return found

    def _shared(self, chain: Chain) -> Iterator[int]:
        """Anchors that some prompt here shares with this one."""
        for count in _leading(chain):
            if chain[count - 1] not in self._filed:
                return
            yield count

    def check(self) -> None:
        """Raise AssertionError if prompts and anchors do not fit each other; for tests."""
        filed: dict[int, dict[str, dict[str, Chain]]] = {}
        for flight, opened in self._open.items():
            for count in _leading(opened.chain):
                filed.setdefault(opened.chain[count - 1], {}).setdefault(opened.address, {})[flight] = opened.chain
        assert filed == self._filed


def _leading(chain: Chain) -> tuple[int, ...]:
    return ANCHORS[: bisect_right(ANCHORS, len(chain))]


def _common(chain: Chain, other: Chain, least: int) -> int:
    """Leading units that both have, or `least` where they have no more than that."""
    low, high = least, min(len(chain), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if chain[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
