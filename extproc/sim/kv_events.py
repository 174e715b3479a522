"""What simulated replicas tell routers of their KV caches, as vLLM's KV events reach the service.

Traces have ids of blocks and no tokens, so a block's tokens are made from its id: equal ids, equal tokens. An engine tells its blocks at
the end of a step, those of generated tokens with the end of the stretch of steps in which nothing begins or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from extproc.core.prefix.exact import UNIT, token_chain
from extproc.core.types import (
    BlocksRemoved,
    BlocksStored,
    CacheChange,
    CacheChanged,
    CacheCleared,
    CacheUnknown,
    TokenBlocks,
)
from extproc.sim.blocks import Note, Stored
from extproc.sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Events:
    """How KV events travel."""

    lag_s: float = 0.002
    """From the end of the step to the router; vLLM 0.32 takes 1.6 ms as a median, up to 133 ms under load."""
    loss: float = 0.0
    """Share of the messages that never come, and that nobody can tell again."""


CacheFact = CacheChanged | CacheUnknown


class Telling:
    """From replicas to routers, each message in its turn."""

    def __init__(
        self,
        events: Events,
        pool: str,
        sizes: Mapping[str, int],
        timeline: Timeline,
        hear: Callable[[CacheFact], None],
        seed: int,
    ) -> None:
        """`sizes`: tokens in a block, by replica. Raises ValueError where those are not whole units."""
        if wrong := sorted({size for size in sizes.values() if size % UNIT}):
            raise ValueError(f"KV events tell of blocks of {UNIT} tokens or a multiple of it, not of {wrong[0]}")
        self._events, self._pool, self._sizes = events, pool, sizes
        self._timeline, self._hear = timeline, hear
        self._rng = Random(f"{seed}/events")
        self._new = set(sizes)
        """Replicas whose process has told nothing yet."""
        self._gaps: set[str] = set()
        """Replicas of which something was lost since they were new."""

    def tell(self, address: str, notes: list[Note]) -> None:
        """A replica's step is over."""
        changes: list[CacheChange] = []
        if address in self._new:
            self._new.discard(address)
            self._gaps.discard(address)
            changes.append(CacheCleared())
        changes += _changes(notes, self._sizes[address])
        if self._events.loss and self._rng.random() < self._events.loss:
            self._gaps.add(address)
            fact: CacheFact = CacheUnknown(self._pool, address)
        else:
            fact = CacheChanged(self._pool, address, tuple(changes), whole=address not in self._gaps)
        if self._events.lag_s:
            self._timeline.at(self._timeline.now + self._events.lag_s, self._hear, fact)
        else:
            self._hear(fact)

    def restarted(self, address: str) -> None:
        """The replica is another process from now on. Nothing is told of that until it tells something itself."""
        self._new.add(address)


def _changes(notes: Iterable[Note], size: int) -> list[CacheChange]:
    changes: list[CacheChange] = []
    removed: list[int] = []
    for note in notes:
        if not isinstance(note, Stored):
            removed.append(note)
            continue
        if removed:
            changes.append(BlocksRemoved(tuple(removed)))
            removed = []
        changes.append(BlocksStored(note.hashes, note.parent, _tokens(note.hashes, size), size))
    if removed:
        changes.append(BlocksRemoved(tuple(removed)))
    return changes


def token_blocks(ids: Iterable[int], size: int) -> TokenBlocks:
    """A prompt of blocks with these ids, of `size` tokens each, as a router that tokenizes has it."""
    return token_chain(_tokens(ids, size))


def _tokens(ids: Iterable[int], size: int) -> tuple[int, ...]:
    rest = (0,) * (size - 2)
    tokens: list[int] = []
    for block in ids:
        tokens.append(block & 0xFFFF_FFFF)
        tokens.append(block >> 32)
        tokens += rest
    return tuple(tokens)
