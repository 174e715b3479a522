"""What the routers of a simulated fleet tell each other: the store between them, in virtual time.

It stands for the shared state of the service: each router writes what it has once a beat, with an expiry, and reads in the same
call what the others have written, so what it knows of them is up to a beat old, and as old again as their beats are apart.
"""

from __future__ import annotations

from collections import deque
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

    beat_s: float = 0.05
    """Between two words of a router."""
    delay_s: float = 0.001
    """To the store, and as long back."""
    loss: float = 0.0
    """Share of the beats that come to nothing: neither written nor read."""
    expiry_s: float = 1.0
    """What a router wrote is gone after so long."""
    loads: bool = True
    placements: bool = True
    """Whether these are told at all; to see what each is worth."""


@dataclass(frozen=True, slots=True)
class Word:
    """What one router wrote in one beat."""

    said_at: float
    loads: tuple[PeerLoad, ...]
    judgements: tuple[Judgement, ...]
    tenants: tuple[TenantServed, ...]
    placed: list[Placed]


def word(router: Router, pool: str, sharing: Sharing, now: float) -> Word:
    """What the router has to tell now."""
    placed = router.placements() if sharing.placements else []
    loads = router.report(pool, now) if sharing.loads else ()
    return Word(now, loads, router.verdicts(pool, now), router.served(pool), placed)


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
            facts.append(PeerReported(self._pool, str(other), w.loads, now - w.said_at))
            facts.append(PeerJudged(self._pool, str(other), w.judgements))
            facts.append(PeerServed(self._pool, str(other), w.tenants))
        reader.known = set(there)
        return facts
