"""Which replica holds which prefix blocks: an approximate mirror of the engines' own caches, bounded at insert time.

One bit mask of replicas per block hash. A walk down a prompt's chain costs one dictionary look-up per block, whatever the
number of replicas, and ends where no replica follows: only contiguous matches count, as in the engine.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from extproc.core.types import Blocks

UNKNOWN_CAPACITY_BYTES = 1_600_000
"""Assumed for a replica that has not told its KV size: 400,000 tokens of 4 bytes, an 8B model on one 80 GB GPU."""


@dataclass(slots=True)
class _Shelf:
    """The blocks of one replica, least recently used first."""

    bit: int
    capacity_bytes: float = UNKNOWN_CAPACITY_BYTES
    held_bytes: int = 0
    blocks: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """hash -> bytes of the block"""
    pending: dict[int, str] = field(default_factory=dict)
    """hash -> flight that was the first to bring the block and has not ended; withdrawn if it fails"""


class PrefixIndex:
    """Block hash -> replicas. All sizes are bytes of canonical prompt."""

    def __init__(self, max_entries: int = 2_000_000) -> None:
        self._max_entries = max_entries
        self._entries = 0
        self._masks: dict[int, int] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._owners: dict[int, str] = {}
        self._free_bits: list[int] = []

    def __len__(self) -> int:
        """Entries: one per block and replica."""
        return self._entries

    def __repr__(self) -> str:
        return f"<prefix index {self._entries} entries, {len(self._masks)} blocks, {len(self._shelves)} replicas>"

    @property
    def addresses(self) -> frozenset[str]:
        """Replicas that the index has room for."""
        return frozenset(self._shelves)

    def held_bytes(self, address: str) -> int:
        """Canonical bytes that the replica is believed to hold."""
        shelf = self._shelves.get(address)
        return shelf.held_bytes if shelf else 0

    def match(self, blocks: Blocks) -> dict[str, int]:
        """Replica -> bytes of the prompt's head that it holds, contiguous from the start; no entry means none."""
        found: dict[str, int] = {}
        alive, covered = -1, 0
        for block, end in zip(blocks.hashes, blocks.ends, strict=True):
            here = self._masks.get(block, 0) & alive
            if here != alive:
                if covered:
                    self._note(found, alive & ~here, covered)
                if not here:
                    return found
                alive = here
            covered = end
        if covered:
            self._note(found, alive, covered)
        return found

    def _note(self, found: dict[str, int], mask: int, covered: int) -> None:
        while mask:
            low = mask & -mask
            found[self._owners[low]] = covered
            mask ^= low

    def insert(self, address: str, blocks: Blocks, flight: str | None = None) -> None:
        """The replica will hold these blocks. With `flight`, those it did not hold yet stay withdrawable until settled."""
        shelf = self._shelves.get(address) or self._shelf(address)
        held, masks, bit, pending = shelf.blocks, self._masks, shelf.bit, shelf.pending
        before = len(held)
        starts = (0, *blocks.ends)
        # From the tail to the head, so that the head of the chain ends up most recent and the tail is evicted first, as in vLLM.
        for i in range(len(blocks.hashes) - 1, -1, -1):
            block = blocks.hashes[i]
            if block in held:
                held.move_to_end(block)
                continue
            size = starts[i + 1] - starts[i]
            held[block] = size
            shelf.held_bytes += size
            masks[block] = masks.get(block, 0) | bit
            if flight is not None:
                pending[block] = flight
        self._entries += len(held) - before
        self._shrink(shelf)

    def keep(self, address: str, blocks: Blocks) -> None:
        """A flight with these blocks succeeded there: they stay, whoever brought them, and are most recent again."""
        self.insert(address, blocks)
        if pending := self._shelves[address].pending:
            for block in blocks.hashes:
                pending.pop(block, None)

    def withdraw(self, address: str, blocks: Blocks, flight: str) -> None:
        """The flight failed: what it alone brought was never computed there."""
        if shelf := self._shelves.get(address):
            for block in blocks.hashes:
                if shelf.pending.get(block) == flight:
                    self._drop(shelf, block)

    def set_capacity(self, address: str, capacity_bytes: float) -> None:
        """The replica's KV cache holds that much canonical prompt."""
        shelf = self._shelves.get(address) or self._shelf(address)
        shelf.capacity_bytes = capacity_bytes
        self._shrink(shelf)

    def clear(self, address: str) -> None:
        """The replica's cache is empty: it restarted."""
        if shelf := self._shelves.get(address):
            for block in tuple(shelf.blocks):
                self._drop(shelf, block)

    def forget(self, address: str) -> None:
        """The replica left."""
        self.clear(address)
        if shelf := self._shelves.pop(address, None):
            del self._owners[shelf.bit]
            self._free_bits.append(shelf.bit)

    def _shelf(self, address: str) -> _Shelf:
        bit = self._free_bits.pop() if self._free_bits else 1 << len(self._shelves)
        self._owners[bit] = address
        return self._shelves.setdefault(address, _Shelf(bit))

    def _drop(self, shelf: _Shelf, block: int) -> None:
        size = shelf.blocks.pop(block)
        shelf.pending.pop(block, None)
        shelf.held_bytes -= size
        self._entries -= 1
        if rest := self._masks[block] & ~shelf.bit:
            self._masks[block] = rest
        else:
            del self._masks[block]

    def _shrink(self, shelf: _Shelf) -> None:
        while shelf.held_bytes > shelf.capacity_bytes:
            self._drop(shelf, next(iter(shelf.blocks)))
        while (excess := self._entries - self._max_entries) > 0:
            # The largest holder gives way, so that one busy replica cannot push the others out. All at once: looking
            # for the largest again after each block costs as much per block as there are replicas.
            largest = max(self._shelves.values(), key=lambda s: len(s.blocks))
            for block in tuple(islice(largest.blocks, excess)):
                self._drop(largest, block)

    def check(self) -> None:
        """Raise AssertionError if the index contradicts itself; for tests."""
        assert self._entries == sum(len(s.blocks) for s in self._shelves.values()) <= self._max_entries
        assert self._entries == sum(mask.bit_count() for mask in self._masks.values())
        for shelf in self._shelves.values():
            assert shelf.held_bytes == sum(shelf.blocks.values()) <= shelf.capacity_bytes
            assert all(self._masks[block] & shelf.bit for block in shelf.blocks)
            assert shelf.pending.keys() <= shelf.blocks.keys()
        bits = [shelf.bit for shelf in self._shelves.values()]
        assert {s.bit: a for a, s in self._shelves.items()} == self._owners
        assert sorted(bits + self._free_bits) == [1 << i for i in range(len(bits) + len(self._free_bits))]
