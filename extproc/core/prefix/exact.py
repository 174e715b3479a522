"""Which replica holds which blocks of tokens, as engines tell by their KV events: exact, where the approximate index guesses.

Engines name blocks by hashes of their own, which differ between engines, their versions and their settings. Those names are kept as
opaque ids, for removals and for the link to the block before; prompts are matched by our own chained hash over token ids.

Three things of vLLM 0.32 (`block_pool.py`) decide the rules below.
1. A hit is whole blocks, and at least one token is left to compute: a prompt that is cached as a whole loses its last block.
2. A block may lie there twice, under one id: the last block of such a prompt is computed again, and stored as a copy. Each copy is
   removed in its own turn, so copies are counted. But a request may ask that the blocks it reuses be told again
   (`kv_cache_report_mode`), which makes no copy. Reuse is always told from the first block of the prompt on, and a copy of a first
   block is as good as never made: so what begins a prompt and is known is no copy, nor is what goes on from there.
3. Who uses a block uses all before it, and what is given back is given back tail first. So a replica that holds a block holds all
   before it, and where a match ends is found by bisection: of a prompt of 100,000 tokens some 13 of 6,250 blocks are looked at.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeVar

from xxhash import xxh3_64_intdigest

from extproc.core.types import BlockId, BlocksRemoved, BlocksStored, CacheChange, TokenBlocks

UNIT: Final = 16
"""Tokens in a block of ours. Engines whose blocks are no multiples of it are not followed: vLLM mostly has 16, and SGLang as many as its
`--page-size` says, one by default."""
MAX_UNITS: Final = 65_536
"""Of one prompt, a million tokens; what follows never counts as cached."""
MAX_HELD: Final = 1_000_000
"""Blocks of one replica: 40 times what 80 GB hold of an 8B model."""
MAX_ENTRIES: Final = 2_000_000
"""Blocks of all replicas together, 0.2 KB each where replicas have nothing in common."""
ONE_RESTART_S: Final = 20.0
"""A process that was told to be new is not new again within so long: no engine starts faster."""
K = TypeVar("K", int, BlockId)
_TOKEN: Final = "I"
_TOKEN_BYTES: Final = array(_TOKEN).itemsize


def token_chain(
    token_ids: Sequence[int],
    size: int = UNIT,
    lora: str | None = None,
    salt: str | None = None,
    limit: int = MAX_UNITS,
) -> TokenBlocks:
    """Hash the full blocks of `size` tokens of a prompt, up to `limit` of them; the partial tail is left out.

    Each hash is XXH3-64 of its token ids, seeded with the hash before it, and the first with that of adapter and salt: it depends on
    these and on every token before its end. Raises OverflowError for an id below 0 or above 32 bits.
    """
    whole = min(len(token_ids) // size, limit)
    data = array(_TOKEN, token_ids[: whole * size]).tobytes()
    return TokenBlocks(size, tuple(_digests(data, size * _TOKEN_BYTES, _seed(lora, salt))))


def _digests(data: bytes, width: int, digest: int) -> list[int]:
    found = []
    for start in range(0, len(data), width):
        digest = xxh3_64_intdigest(data[start : start + width], digest)
        found.append(digest)
    return found


def _seed(lora: str | None, salt: str | None) -> int:
    return xxh3_64_intdigest(repr((lora, salt)).encode())


class Ignored(StrEnum):
    """Why blocks that an engine told of are not in the index; also a metric label."""

    ORPHAN = "orphan"  # stored behind a block that we never heard of
    UNKNOWN = "unknown"  # removed, and never heard of
    SIZE = "size"  # not of whole units, or of another size than the replica's first
    MALFORMED = "malformed"  # ids and tokens do not fit each other
    FULL = "full"  # of a replica that is not followed until its cache is empty: its blocks are too many, or of another size


@dataclass(slots=True)
class _Shelf:
    """The blocks of one replica."""

    bit: int
    whole: bool = False
    """Nothing was held there that we were not told of."""
    given_up: bool = False
    """It cannot be followed until its cache is empty again."""
    doubted: bool = False
    """Something else than its events said that its cache is empty; they have not said so since."""
    stride: int = 0
    """Units in one of its blocks; 0 before the first."""
    held: dict[BlockId, int] = field(default_factory=dict)
    """id -> our hash of everything up to its end"""
    copies: dict[BlockId, int] = field(default_factory=dict)
    """id -> copies beside the first; mostly none"""
    alike: dict[int, int] = field(default_factory=dict)
    """our hash -> ids beside the first, as when several ranks of one replica hold a block; mostly none"""
    told_again: BlockId | None = None
    """The last block of a prompt that was told again; what goes on from it is told again too."""
    cleared_at: float | None = None


class ExactIndex:
    """Our hash of a prompt's head -> replicas. Sizes are units, blocks of `UNIT` tokens."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_held: int = MAX_HELD) -> None:
        self._max_entries, self._max_held = max_entries, max_held
        self._entries = 0
        self._masks: dict[int, int] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._owners: dict[int, str] = {}
        self._free_bits: list[int] = []
        self._strides: dict[int, int] = {}
        """Units in a block -> replicas whose blocks have so many."""
        self._whole: set[str] = set()
        self.ignored: Counter[Ignored] = Counter(dict.fromkeys(Ignored, 0))
        """Blocks, since the start."""

    def __len__(self) -> int:
        """Entries: one per id and replica."""
        return self._entries

    def __repr__(self) -> str:
        return f"<exact index {self._entries} entries, {len(self._masks)} blocks, {len(self._whole)} of {len(self._shelves)} replicas whole>"

    @property
    def addresses(self) -> AbstractSet[str]:
        """Replicas of which something was told."""
        return self._shelves.keys()

    @property
    def whole(self) -> AbstractSet[str]:
        """Replicas whose caches are known, with nothing in them that we were not told of."""
        return self._whole

    def knows(self, address: str) -> bool:
        """Whether what is not found there is not there."""
        return address in self._whole

    def held(self, address: str) -> int:
        """Blocks that the replica is known to hold, of its own size."""
        shelf = self._shelves.get(address)
        return len(shelf.held) if shelf else 0

    def stride(self, address: str) -> int:
        """Units in one of its blocks; 1 where it has not told of any yet."""
        shelf = self._shelves.get(address)
        return (shelf.stride if shelf else 0) or 1

    # --- questions ----------------------------------------------------------------------------------------------------

    def match(self, chain: Sequence[int]) -> dict[str, int]:
        """Replica -> leading units of the chain that it holds, in whole blocks of its own; no entry means none.

        The chain must end before the prompt's last token, which an engine always computes.
        """
        found: dict[str, int] = {}
        for stride, mask in self._strides.items():
            if len(chain) < stride:
                continue
            alive = self._masks.get(chain[stride - 1], 0) & mask
            if alive:
                self._bisect(chain, stride, 1, len(chain) // stride, alive, found)
        return found

    def _bisect(
        self, chain: Sequence[int], stride: int, low: int, high: int, alive: int, found: dict[str, int]
    ) -> None:
        """All of `alive` hold `low` blocks, none more than `high`. Where they part, each side goes on by itself."""
        masks = self._masks
        while low < high:
            middle = (low + high + 1) // 2
            here = masks.get(chain[middle * stride - 1], 0) & alive
            if here == alive:
                low = middle
            elif not here:
                high = middle - 1
            else:
                self._bisect(chain, stride, low, middle - 1, alive & ~here, found)
                low, alive = middle, here
        while alive:
            lowest = alive & -alive
            found[self._owners[lowest]] = low * stride
            alive ^= lowest

    # --- what engines tell --------------------------------------------------------------------------------------------

    def apply(self, address: str, changes: Iterable[CacheChange], now: float, whole: bool = True) -> None:
        """A replica told these changes of its cache, in this order. `whole`: nothing is there that it did not tell."""
        shelf = self._shelves.get(address) or self._shelf(address)
        for change in changes:
            if isinstance(change, BlocksStored):
                self._store(shelf, change)
            elif isinstance(change, BlocksRemoved):
                for block in change.ids:
                    self._remove(shelf, block)
            else:
                self._empty(shelf)
                shelf.cleared_at, shelf.doubted = now, False
        self._shrink(shelf)
        shelf.whole = whole and not shelf.doubted
        if shelf.whole and not shelf.given_up:
            self._whole.add(address)
        else:
            self._whole.discard(address)

    def restarted(self, address: str, now: float) -> None:
        """Another process seems to be there than before: its cache is empty, unless its own events said so first and went on.

        Until they say so, what it tells is the least that it holds: where the network was away for a moment, and not the engine, it holds
        what it told before, and does not tell that again.
        """
        shelf = self._shelves.get(address)
        if shelf is None or (shelf.cleared_at is not None and now - shelf.cleared_at < ONE_RESTART_S):
            return
        self._empty(shelf)
        shelf.whole, shelf.doubted = False, True
        self._whole.discard(address)

    def forget(self, address: str) -> None:
        """The replica left, or what it holds is not known any more."""
        shelf = self._shelves.get(address)
        if shelf is None:
            return
        self._empty(shelf)
        del self._shelves[address], self._owners[shelf.bit]
        self._whole.discard(address)
        self._free_bits.append(shelf.bit)

    def _shelf(self, address: str) -> _Shelf:
        bit = self._free_bits.pop() if self._free_bits else 1 << len(self._shelves)
        self._owners[bit] = address
        return self._shelves.setdefault(address, _Shelf(bit))

    def _store(self, shelf: _Shelf, stored: BlocksStored) -> None:
        digest = self._start(shelf, stored)
        if isinstance(digest, Ignored):
            self.ignored[digest] += len(stored.ids)
            return
        try:
            data = array(_TOKEN, stored.token_ids).tobytes()
        except (OverflowError, TypeError):
            self.ignored[Ignored.MALFORMED] += len(stored.ids)
            return
        again = stored.ids[0] in shelf.held and stored.parent in (None, shelf.told_again)
        width, held = stored.size * _TOKEN_BYTES, shelf.held
        for i, block in enumerate(stored.ids):
            known = held.get(block)
            if known is None:
                digest = _digests(data[i * width : (i + 1) * width], UNIT * _TOKEN_BYTES, digest)[-1]
                self._put(shelf, block, digest)
                continue
            digest = known
            if not again:
                shelf.copies[block] = shelf.copies.get(block, 0) + 1
        shelf.told_again = stored.ids[-1] if again else None

    def _start(self, shelf: _Shelf, stored: BlocksStored) -> int | Ignored:
        """Our hash of what comes before these blocks, or why they cannot be taken in."""
        if shelf.given_up:
            return Ignored.FULL
        if not stored.ids or stored.size < 1 or len(stored.token_ids) != stored.size * len(stored.ids):
            return Ignored.MALFORMED
        if stored.size % UNIT:
            self._give_up(shelf)
            return Ignored.SIZE
        if shelf.stride and stored.size != shelf.stride * UNIT:
            return Ignored.SIZE
        if not shelf.stride:
            shelf.stride = stored.size // UNIT
            self._strides[shelf.stride] = self._strides.get(shelf.stride, 0) | shelf.bit
        if stored.parent is None:
            return _seed(stored.lora, stored.salt)
        before = shelf.held.get(stored.parent)
        return Ignored.ORPHAN if before is None else before

    def _put(self, shelf: _Shelf, block: BlockId, digest: int) -> None:
        shelf.held[block] = digest
        self._entries += 1
        mask = self._masks.get(digest, 0)
        if mask & shelf.bit:
            shelf.alike[digest] = shelf.alike.get(digest, 0) + 1
        else:
            self._masks[digest] = mask | shelf.bit

    def _remove(self, shelf: _Shelf, block: BlockId) -> None:
        digest = shelf.held.get(block)
        if digest is None:
            self.ignored[Ignored.FULL if shelf.given_up else Ignored.UNKNOWN] += 1
        elif not _one_less(shelf.copies, block):
            del shelf.held[block]
            self._entries -= 1
            if not _one_less(shelf.alike, digest):
                self._unmark(shelf.bit, digest)

    def _unmark(self, bit: int, digest: int) -> None:
        if rest := self._masks[digest] & ~bit:
            self._masks[digest] = rest
        else:
            del self._masks[digest]

    def _empty(self, shelf: _Shelf) -> None:
        for digest in set(shelf.held.values()):
            self._unmark(shelf.bit, digest)
        self._entries -= len(shelf.held)
        if shelf.stride:
            if rest := self._strides[shelf.stride] & ~shelf.bit:
                self._strides[shelf.stride] = rest
            else:
                del self._strides[shelf.stride]
        shelf.held, shelf.copies, shelf.alike = {}, {}, {}
        shelf.stride, shelf.told_again, shelf.given_up = 0, None, False

    def _shrink(self, shelf: _Shelf) -> None:
        if len(shelf.held) > self._max_held:
            self._give_up(shelf)
        while self._entries > self._max_entries:
            self._give_up(max(self._shelves.values(), key=lambda s: len(s.held)))

    def _give_up(self, shelf: _Shelf) -> None:
        """A part of what it holds would be no better than a guess: it is not followed until its cache is empty."""
        self.ignored[Ignored.FULL] += len(shelf.held)
        self._empty(shelf)
        shelf.given_up = True
        self._whole.discard(self._owners[shelf.bit])

    def check(self) -> None:
        """Raise AssertionError if the index contradicts itself; for tests."""
        shelves = self._shelves
        assert self._entries == sum(len(s.held) for s in shelves.values()) <= self._max_entries
        masks: dict[int, int] = {}
        strides: dict[int, int] = {}
        for shelf in shelves.values():
            counted = Counter(shelf.held.values())
            assert shelf.alike == {digest: n - 1 for digest, n in counted.items() if n > 1}
            assert shelf.copies.keys() <= shelf.held.keys()
            assert all(n > 0 for n in shelf.copies.values())
            assert not (shelf.given_up and shelf.held)
            for digest in counted:
                masks[digest] = masks.get(digest, 0) | shelf.bit
            if shelf.stride:
                strides[shelf.stride] = strides.get(shelf.stride, 0) | shelf.bit
        assert (masks, strides) == (self._masks, self._strides)
        assert self._whole == {address for address, s in shelves.items() if s.whole and not s.given_up}
        bits = [shelf.bit for shelf in shelves.values()]
        assert {s.bit: a for a, s in shelves.items()} == self._owners
        assert sorted(bits + self._free_bits) == [1 << i for i in range(len(bits) + len(self._free_bits))]


def _one_less(counts: dict[K, int], key: K) -> bool:
    """Whether there was one beside the first, which is taken off."""
    if key not in counts:
        return False
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
    return True
