"""What the routers of a simulated fleet tell each other: the store between them, in virtual time.

It stands for the shared state of the service: each router writes what it has once a beat, with an expiry, and reads in the same
call what the others have written, so what it knows of them is up to a beat old, and as old again as their beats are apart.
Where routers push, each also tells all others what it placed, and the loads that this changed, as soon as it did.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from extproc.core.router import Router
from extproc.core.types import (
    Fact,
    Judgement,
    PeerGone,
    PeerJudged,
    PeerLoad,
    PeerReported,
    PeerServed,
    Placed,
    TenantServed,
)

MAX_STREAM: Final = 10_000
"""Placements that the store keeps; the oldest give way."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How routers talk."""

    beat_s: float = 0.5
    """Between two words of a router on all that it has."""
    push: bool = True
    """Whether routers tell what they placed at once."""
    push_interval_s: float = 0.005
    """Least time between two pushes of a router."""
    ends_within_s: float | None = 0.05
    """How long the end of a request may wait for a placement to be pushed with; None where it waits for the beat."""
    delay_s: float = 0.001
    """To the store, and as long back."""
    loss: float = 0.0
    """Share of the beats that come to nothing, neither written nor read, and of the pushes."""
    expiry_s: float = 1.0
    """What a router wrote is gone after so long."""
    loads: bool = True
    placements: bool = True
    """Whether these are told at all; to see what each is worth."""


@dataclass(frozen=True, slots=True)
class Word:
    """What one router wrote in one beat, or pushed."""

    number: int
    """Counts its words up."""
    said_at: float
    loads: tuple[PeerLoad, ...]
    judgements: tuple[Judgement, ...]
    tenants: tuple[TenantServed, ...]
    placed: list[Placed]
    whole: bool = True
    """False for a push between beats: `loads` of some replicas, `placed`, and nothing else."""

    def reported(self, pool: str, router: int, now: float) -> PeerReported:
        """Its loads, as a fact."""
        return PeerReported(pool, str(router), self.loads, now - self.said_at, self.number, self.whole)


def word(router: Router, pool: str, sharing: Sharing, number: int, now: float) -> Word:
    """What the router has to tell now."""
    placed = router.placements() if sharing.placements else []
    loads = router.report(pool, now) if sharing.loads else ()
    return Word(number, now, loads, router.verdicts(pool, now), router.served(pool), placed)


def push(router: Router, pool: str, sharing: Sharing, number: int, changed: Collection[str], now: float) -> Word:
    """What the router has to tell at once: of the replicas whose load changed, and what it placed."""
    placed = router.placements() if sharing.placements else []
    loads = router.report(pool, now, changed) if sharing.loads else ()
    return Word(number, now, loads, (), (), placed, whole=False)


@dataclass(slots=True)
class _Reader:
    """One router, as one that reads."""

    known: set[int] = field(default_factory=set)
    """Whose words it has heard."""
    read: int = 0
    """Placements of the stream that it has had."""


class Store:
    """The last word of each router, and the stream of placements."""

    def __init__(self, pool: str, expiry_s: float) -> None:
        self._pool = pool
        self._expiry_s = expiry_s
        self._words: dict[int, Word] = {}
        self._stream: deque[tuple[int, Placed]] = deque(maxlen=MAX_STREAM)
        self._streamed = 0
        self._readers: dict[int, _Reader] = {}
        self._listeners: dict[int, Callable[[list[Fact]], object]] = {}
        self.told = 0
        """Facts handed out."""

    def __repr__(self) -> str:
        return f"<store {len(self._words)} words, {self._streamed} placements>"

    def exchange(self, router: int, said: Word, now: float) -> list[Fact]:
        """Write a router's word and read those of the others, and what was placed since it last read."""
        self._words[router] = said
        reader = self._readers.setdefault(router, _Reader())
        facts: list[Fact] = [*self._placed(router, reader), *self._heard(router, reader, now)]
        for placed in said.placed:
            self._stream.append((router, placed))
            self._streamed += 1
        self.told += len(facts)
        return facts

    def listen(self, router: int, hear: Callable[[list[Fact]], object]) -> None:
        """From now on the router hears what others push."""
        self._listeners[router] = hear

    def push(self, router: int, said: Word, now: float) -> None:
        """Hand a word to all others that listen."""
        facts: list[Fact] = [*said.placed, said.reported(self._pool, router, now)]
        for other, hear in self._listeners.items():
            if other != router:
                self.told += len(facts)
                hear(facts)

    def _placed(self, router: int, reader: _Reader) -> list[Fact]:
        new = min(self._streamed - reader.read, len(self._stream))
        reader.read = self._streamed
        latest = islice(self._stream, len(self._stream) - new, None)
        return [placed for whose, placed in latest if whose != router]

    def _heard(self, router: int, reader: _Reader, now: float) -> list[Fact]:
        facts: list[Fact] = []
        there = {other: w for other, w in self._words.items() if other != router and now - w.said_at < self._expiry_s}
        for other in sorted(reader.known - there.keys()):
            facts.append(PeerGone(self._pool, str(other)))
        for other, w in there.items():
            facts.append(w.reported(self._pool, other, now))
            facts.append(PeerJudged(self._pool, str(other), w.judgements))
            facts.append(PeerServed(self._pool, str(other), w.tenants))
        reader.known = set(there)
        return facts
