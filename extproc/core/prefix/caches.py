"""Where the head of a prompt is cached: one question to two indexes, and one answer.

Replica by replica the exact index answers, where the request is tokenized and the replica tells of its cache, and the approximate one
otherwise. What was sent to a replica a moment ago counts in both, for it will be there by the time the next request is begun.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from extproc.core.prefix.exact import UNIT, ExactIndex
from extproc.core.prefix.index import PrefixIndex
from extproc.core.prefix.pending import Pending
from extproc.core.types import CacheChanged, CacheUnknown, Request

NOBODY: frozenset[str] = frozenset()
Hits = tuple[dict[str, float], AbstractSet[str]]
"""Replica -> tokens of the prompt's head that are cached there, and the replicas of which that is known, not guessed."""


class Caches:
    """The prefix caches of one pool's replicas."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.exact = ExactIndex()
        self.pending = Pending()

    def __repr__(self) -> str:
        return f"<caches {self.index!r} {self.exact!r} {self.pending!r}>"

    def hits(self, request: Request, prompt_tokens: int) -> Hits:
        """Where the cache is known, and how much of the prompt's head is in it; the rest is guessed."""
        hits: dict[str, float] = {}
        if request.blocks.hashes:
            per_byte = prompt_tokens / request.prompt_bytes if request.prompt_bytes else 0.0
            hits = {address: n * per_byte for address, n in self.index.match(request.blocks).items()}
        if request.tokens is None or request.tokens.size != UNIT or not self.exact.addresses:
            return hits, NOBODY
        whole, found = self.exact.whole, self.known(request)
        for address in whole:
            hits.pop(address, None)
        for address, tokens in found.items():
            # Of one that is not known as a whole this is the least that it holds.
            hits[address] = tokens if address in whole else max(tokens, hits.get(address, 0.0))
        return hits, whole

    def known(self, request: Request) -> dict[str, int]:
        """Replica -> tokens of the prompt's head that it is known to hold, or will as it was sent them; whole blocks of its own."""
        assert request.tokens is not None
        exact, chain = self.exact, request.tokens.hashes
        if request.prompt_tokens is not None:
            chain = chain[: max(request.prompt_tokens - 1, 0) // UNIT]
        found = exact.match(chain)
        for address, units in self.pending.extend(chain, found).items():
            stride = exact.stride(address)
            found[address] = units // stride * stride
        return {address: units * UNIT for address, units in found.items()}

    def placed(self, flight: str, address: str, request: Request) -> None:
        """A request was sent to the replica."""
        if request.blocks.hashes:
            self.index.insert(address, request.blocks, flight)
        if request.tokens is not None and request.tokens.size == UNIT:
            self.pending.insert(flight, address, request.tokens.hashes)

    def told(self, fact: CacheChanged | CacheUnknown, now: float) -> None:
        """A replica told of its cache, or will no more."""
        if isinstance(fact, CacheChanged):
            self.exact.apply(fact.address, fact.changes, now, fact.whole)
        else:
            self.exact.forget(fact.address)

    def restarted(self, address: str, now: float) -> None:
        """Another process is there than before, with an empty cache."""
        self.index.clear(address)
        self.exact.restarted(address, now)
        self.pending.clear(address)

    def gone(self, address: str) -> None:
        """The replica gets nothing more. While it is a member it may come back, and what it tells goes on from what it told."""
        self.index.forget(address)
        self.pending.clear(address)

    def forget(self, address: str) -> None:
        """The replica left."""
        self.index.forget(address)
        self.exact.forget(address)
        self.pending.clear(address)

    def check(self) -> None:
        """Raise AssertionError if one of them contradicts itself; for tests."""
        self.index.check()
        self.exact.check()
        self.pending.check()
