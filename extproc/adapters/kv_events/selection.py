"""Which of an engine's events tell what a prompt finds in its prefix cache, and what they come to for the core.

1. Other tiers than the GPU (CPU, storage, remote) do not count. A block there is cheaper to load than to compute, but by how much
   nobody knows here, and an engine need not report it in `cached_tokens`: taken for a hit it would be a promise nobody made.
2. Of a model whose layers keep different caches only one with full attention counts, for it alone holds whole prefixes. Removals name
   the cache by its number alone, under the same hashes as the others: without the number a window that slides would empty the prefix.
3. Blocks computed from more than tokens (images, embeddings) end a chain: tokens alone would not tell them apart. What is stored behind
   them has a parent that the core never heard of.
4. An adapter without a name (vLLM before 0.16 tells a number) could be any, so its blocks do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from extproc.adapters.kv_events import wire
from extproc.adapters.kv_events.wire import Batch, Removed, Stored
from extproc.core.types import BlockId, BlocksRemoved, BlocksStored, CacheChange, CacheCleared

WHOLE_PREFIXES: Final = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Kinds of caches in which a block stays useful however much follows it."""
FIRST_GROUP: Final = 0
"""The one taken where its kind is not told (vLLM 0.20 to 0.22)."""
RANK_BITS: Final = 64
"""Hashes have no more, so a rank above them makes ids of two ranks different."""


class Passed(StrEnum):
    """Why an event, or a part of it, does not count; also the metric label."""

    TIER = "tier"
    GROUP = "group"
    CONTENT = "content"
    ADAPTER = "adapter"
    UNKNOWN = "unknown"
    MALFORMED = "malformed"


@dataclass(slots=True)
class Tally:
    """How many events counted, and how many did not."""

    taken: Counter[str] = field(default_factory=lambda: Counter({wire.STORED: 0, wire.REMOVED: 0, wire.CLEARED: 0}))
    """By type."""
    passed: Counter[Passed] = field(default_factory=lambda: Counter(dict.fromkeys(Passed, 0)))


class Selection:
    """What counts of one publisher."""

    def __init__(self, rank: int = 0, tally: Tally | None = None) -> None:
        """Ids of other ranks than the first are made different from those of the first: equal content has equal hashes in all."""
        self._rank = rank
        self._group: int | None = None
        """The cache that counts; None until one did."""
        self.tally = tally or Tally()

    def __repr__(self) -> str:
        return f"<Selection of rank {self._rank}, group {self._group}>"

    def take(self, batch: Batch) -> list[CacheChange]:
        """The changes that a batch comes to, in its order."""
        self.tally.passed[Passed.UNKNOWN] += batch.unknown
        self.tally.passed[Passed.MALFORMED] += batch.malformed
        changes: list[CacheChange] = []
        for event in batch.events:
            if isinstance(event, Stored):
                change: CacheChange | Passed = self._stored(event)
            else:
                change = self._removed(event) if isinstance(event, Removed) else CacheCleared()
            if isinstance(change, Passed):
                self.tally.passed[change] += 1
            else:
                self.tally.taken[_TYPES[type(change)]] += 1
                changes.append(change)
        return changes

    def anew(self) -> None:
        """The engine began anew, perhaps with another model."""
        self._group = None

    def _stored(self, event: Stored) -> BlocksStored | Passed:
        if _elsewhere(event):
            return Passed.TIER
        if not self._counts(event):
            return Passed.GROUP
        if event.lora_id is not None and event.lora_name is None:
            return Passed.ADAPTER
        ids, size, tokens = event.block_hashes, event.block_size, event.token_ids
        if size < 1 or not ids or len(tokens) != size * len(ids):
            return Passed.MALFORMED
        salt, plain = _read_keys(event)
        if plain < len(ids):
            if not plain:
                return Passed.CONTENT
            self.tally.passed[Passed.CONTENT] += 1  # of an event that counts in part
            ids, tokens = ids[:plain], tokens[: plain * size]
        parent = event.parent_block_hash
        if self._rank:
            ids, parent = tuple(map(self._ranked, ids)), None if parent is None else self._ranked(parent)
        return BlocksStored(ids, parent, tokens, size, event.lora_name, salt)

    def _removed(self, event: Removed) -> BlocksRemoved | Passed:
        if _elsewhere(event):
            return Passed.TIER
        if event.group_idx is not None and event.group_idx != self._group:
            return Passed.GROUP
        return BlocksRemoved(tuple(map(self._ranked, event.block_hashes)) if self._rank else event.block_hashes)

    def _counts(self, event: Stored) -> bool:
        """Whether its cache is the one that counts; the first with full attention is."""
        group, kind = event.group_idx, event.kv_cache_spec_kind
        if kind in WHOLE_PREFIXES and self._group is None:
            self._group = group
        elif kind is None and group == FIRST_GROUP:
            self._group = FIRST_GROUP
        return (kind is None or kind in WHOLE_PREFIXES) and group == self._group

    def _ranked(self, block: BlockId) -> BlockId:
        if isinstance(block, int):
            return self._rank << RANK_BITS | block & (1 << RANK_BITS) - 1
        return block + self._rank.to_bytes(4, "big")


_TYPES: Final[dict[type[CacheChange], str]] = {
    BlocksStored: wire.STORED,
    BlocksRemoved: wire.REMOVED,
    CacheCleared: wire.CLEARED,
}


def _elsewhere(event: Stored | Removed) -> bool:
    return event.medium not in (None, "GPU") or event.locality == "REMOTE"


def _read_keys(event: Stored) -> tuple[str | None, int]:
    """The salt, and how many of the blocks, from the first on, were computed from tokens, adapter and salt alone.

    A salt is a text in the first block of a chain, behind the adapter's name. Media are pairs, or texts in vLLM before 0.24:
    one of those in the first block passes for a salt, and so matches no prompt that has none.
    """
    found = wire.salt(event)
    for i, keys in enumerate(event.extra_keys or ()):
        rest = keys or ()
        if event.lora_name is not None and rest and rest[0] == event.lora_name:
            rest = rest[1:]
        if not rest:
            continue
        if i or event.parent_block_hash is not None or len(rest) > 1 or not isinstance(rest[0], str):
            return found, i
        found = rest[0]
    return found, len(event.block_hashes)


def blocks(change: CacheChange) -> int:
    """How many blocks it names; 1 for all."""
    return 1 if isinstance(change, CacheCleared) else len(change.ids)


def sliced(changes: Iterable[CacheChange], most: int) -> Iterator[tuple[CacheChange, ...]]:
    """The changes in their order, in parts of at most `most` blocks; where one change has more, it is divided."""
    part: list[CacheChange] = []
    room = most
    for change in _divided(changes, most):
        size = blocks(change)
        if size > room:
            yield tuple(part)
            part, room = [], most
        part.append(change)
        room -= size
    if part:
        yield tuple(part)


def _divided(changes: Iterable[CacheChange], most: int) -> Iterator[CacheChange]:
    for change in changes:
        if isinstance(change, CacheCleared) or len(change.ids) <= most:
            yield change
        elif isinstance(change, BlocksRemoved):
            yield from (BlocksRemoved(change.ids[i : i + most]) for i in range(0, len(change.ids), most))
        else:
            yield from _pieces(change, most)


def _pieces(stored: BlocksStored, most: int) -> Iterator[BlocksStored]:
    """Each goes on where the one before ended; only the first tells the salt, as engines do."""
    parent, salt = stored.parent, stored.salt
    for i in range(0, len(stored.ids), most):
        ids = stored.ids[i : i + most]
        tokens = stored.token_ids[i * stored.size : (i + len(ids)) * stored.size]
        yield BlocksStored(ids, parent, tokens, stored.size, stored.lora, salt)
        parent, salt = ids[-1], None
