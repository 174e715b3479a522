"""The KV cache of a simulated replica: blocks by the hash of their content, with the least recently used evicted first.

Physical block numbers decide nothing, so only counts and hashes are kept. A block is one of
    held     has a hash and at least one sequence that uses it
    private  used by one sequence, not full yet or without a hash; only the sequence counts it
    idle     has a hash and no user: a hit until it is evicted
    blank    has neither
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """`num_blocks` blocks. Two computed copies of one content count as one block: vLLM keeps both until their end."""

    __slots__ = ("blank", "held", "idle", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blank = num_blocks
        self.held: dict[int, int] = {}
        """Hash -> users."""
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Oldest first."""

    def __repr__(self) -> str:
        return f"<blocks {self.used}/{self.num_blocks} used, {len(self.idle)} idle>"

    @property
    def free(self) -> int:
        """Blocks that can be taken now: blank ones, and idle ones by eviction."""
        return self.blank + len(self.idle)

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    def leading(self, hashes: Sequence[int], limit: int) -> int:
        """How many of the first `limit` hashes are present without a gap."""
        held, idle = self.held, self.idle
        n = 0
        for h in hashes[:limit]:
            if h not in held and h not in idle:
                break
            n += 1
        return n

    def can_take(self, hashes: Sequence[int], hits: int, new: int) -> bool:
        """Whether `new` blocks are free beside the first `hits` hashes, of which the idle ones stop being free."""
        if new + hits <= self.free:
            return True
        return new + sum(h in self.idle for h in hashes[:hits]) <= self.free

    def share(self, hashes: Sequence[int], hits: int) -> None:
        """One more user for each of the first `hits` hashes, all present."""
        held, idle = self.held, self.idle
        for h in hashes[:hits]:
            if h in held:
                held[h] += 1
            else:
                del idle[h]
                held[h] = 1

    def take(self, n: int) -> None:
        """Make `n` free blocks private; blank ones first, for they hold nothing that could be hit."""
        blank = min(n, self.blank)
        self.blank -= blank
        evict = self.idle.popitem
        for _ in range(n - blank):
            evict(last=False)

    def register(self, hashes: Sequence[int], start: int, stop: int) -> None:
        """Private blocks `start` to `stop` of a sequence are full: others may share them from now on."""
        held, idle = self.held, self.idle
        for h in hashes[start:stop]:
            users = held.get(h)
            if users is None:
                held[h] = 1
                if h in idle:
                    del idle[h]
                    self.blank += 1
            else:
                held[h] = users + 1
                self.blank += 1

    def release(self, hashes: Sequence[int], registered: int, private: int) -> None:
        """A sequence ends. Its last blocks become the older ones: a prefix is worth more than what follows it."""
        self.blank += private
        held, idle = self.held, self.idle
        for h in reversed(hashes[:registered]):
            users = held[h]
            if users == 1:
                del held[h]
                idle[h] = None
            else:
                held[h] = users - 1
