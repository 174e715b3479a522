"""The KV cache of a simulated replica: blocks by the hash of their content, with the least recently used evicted first.

Physical block numbers decide nothing, so only counts and hashes are kept. A block is one of
    held     has a hash and at least one sequence that uses it
    private  used by one sequence, not full yet or without a hash; only the sequence counts it
    idle     has a hash and no user: a hit until it is evicted
    blank    has neither
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias


class Copy:
    """A block whose content lies in another block as well. Each is itself alone, so it has no value to compare by."""

    __slots__ = ("hash",)

    def __init__(self, of: int) -> None:
        self.hash = of
        """Of its content."""

    def __repr__(self) -> str:
        return f"<copy of {self.hash}>"


Key: TypeAlias = int | Copy
"""A block with a hash: the hash itself, for the first with that content."""


class Stored(NamedTuple):
    """Blocks that others may share from now on, one after the other in a chain."""

    hashes: tuple[int, ...]
    parent: int | None
    """The block before the first; None where that begins a prompt."""


Note: TypeAlias = Stored | int
"""What the pool did, as an engine tells it: blocks stored, copies among them, or the hash of one evicted."""


class BlockPool:
    """`num_blocks` blocks.

    A content may be there more than once, as in vLLM, which never puts one block of a sequence in the place of another:
    the last block of a prompt that is cached as a whole is computed again, and two sequences may generate alike. Each copy
    takes its own place and is evicted in its own turn; hits go to the oldest.
    """

    __slots__ = ("_copies", "blank", "held", "idle", "journal", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blank = num_blocks
        self.held: dict[Key, int] = {}
        """Block -> users."""
        self.idle: OrderedDict[Key, None] = OrderedDict()
        """Oldest first."""
        self.journal: list[Note] | None = None
        """What is stored and evicted, for whoever wants to know; None for nobody."""
        self._copies: dict[int, list[Copy]] = {}
        """By hash, oldest first; mostly none."""

    def __repr__(self) -> str:
        return f"<blocks {self.used}/{self.num_blocks} used, {len(self.idle)} idle>"

    @property
    def free(self) -> int:
        """Blocks that can be taken now: blank ones, and idle ones by eviction."""
        return self.blank + len(self.idle)

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    def leading(self, hashes: Sequence[int], limit: int) -> list[Key]:
        """Blocks of the first `limit` hashes, up to the first that is absent."""
        held, idle, copies = self.held, self.idle, self._copies
        n = 0
        for h in hashes[:limit]:
            if h not in held and h not in idle:
                break
            n += 1
        found: list[Key] = [*hashes[:n]]
        if copies:
            found += self._with_copies(hashes[n:limit])
        return found

    def _with_copies(self, hashes: Sequence[int]) -> Iterator[Key]:
        """The rest, where the first of a content may be gone and a copy left."""
        for h in hashes:
            if h in self.held or h in self.idle:
                yield h
            elif h in self._copies:
                yield self._copies[h][0]
            else:
                return

    def can_take(self, hits: Sequence[Key], new: int) -> bool:
        """Whether `new` blocks are free beside those hit, of which the idle ones stop being free."""
        if new + len(hits) <= self.free:
            return True
        return new + sum(key in self.idle for key in hits) <= self.free

    def share(self, hits: Sequence[Key]) -> None:
        """One more user for each of these."""
        held, idle = self.held, self.idle
        for key in hits:
            if key in held:
                held[key] += 1
            else:
                del idle[key]
                held[key] = 1

    def take(self, n: int) -> None:
        """Make `n` free blocks private; blank ones first, for they hold nothing that could be hit."""
        blank = min(n, self.blank)
        self.blank -= blank
        evict = self.idle.popitem
        for _ in range(n - blank):
            key, _ = evict(last=False)
            if isinstance(key, Copy):
                self._forget(key)
            if self.journal is not None:
                self.journal.append(key.hash if isinstance(key, Copy) else key)

    def _forget(self, copy: Copy) -> None:
        others = self._copies[copy.hash]
        others.remove(copy)
        if not others:
            del self._copies[copy.hash]

    def register(self, hashes: Sequence[int]) -> list[Key]:
        """Private blocks of a sequence are full, with this content: others may share them from now on."""
        held, idle, copies = self.held, self.idle, self._copies
        fresh: dict[Key, int] = dict.fromkeys(hashes, 1)
        # Nearly always; one by one, a simulation of the Mooncake trace took a tenth longer.
        if len(fresh) == len(hashes) and not copies and held.keys().isdisjoint(fresh) and idle.keys().isdisjoint(fresh):
            held |= fresh
            return [*fresh]
        keys: list[Key] = []
        for h in hashes:
            key: Key = h
            if h in held or h in idle or h in copies:
                key = Copy(h)
                copies.setdefault(h, []).append(key)
            held[key] = 1
            keys.append(key)
        return keys

    def release(self, keys: Sequence[Key], private: int) -> None:
        """A sequence ends. Its last blocks become the older ones: a prefix is worth more than what follows it."""
        self.blank += private
        held, idle = self.held, self.idle
        for key in reversed(keys):
            users = held[key]
            if users == 1:
                del held[key]
                idle[key] = None
            else:
                held[key] = users - 1
