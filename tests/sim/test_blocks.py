"""The pool of counts and hashes against one of physical blocks, and what copies of one content do."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.sim.blocks import BlockPool, Key

SIZE = 12


@dataclass
class Physical:
    """The rules of vLLM's block pool (0.32, `v1/core/block_pool.py`), with numbered blocks and lists: slow and plain."""

    users: list[int] = field(default_factory=lambda: [0] * SIZE)
    content: list[int | None] = field(default_factory=lambda: [None] * SIZE)
    free: list[int] = field(default_factory=lambda: list(range(SIZE)))
    """First evicted first."""
    stored: list[int] = field(default_factory=list)
    """Blocks with a hash, in the order in which they got it."""

    def leading(self, hashes: list[int]) -> list[int]:
        found: list[int] = []
        for h in hashes:
            blocks = [b for b in self.stored if self.content[b] == h]
            if not blocks:
                break
            found.append(blocks[0])
        return found

    def share(self, blocks: list[int]) -> None:
        for b in blocks:
            if not self.users[b]:
                self.free.remove(b)
            self.users[b] += 1

    def take(self, n: int) -> list[int]:
        taken, self.free = self.free[:n], self.free[n:]
        for b in taken:
            if b in self.stored:
                self.stored.remove(b)
            self.users[b], self.content[b] = 1, None
        return taken

    def register(self, block: int, h: int) -> None:
        self.content[block] = h
        self.stored.append(block)

    def release(self, blocks: list[int]) -> None:
        for b in reversed(blocks):
            self.users[b] -= 1
            if self.users[b]:
                continue
            self.free.insert(0 if self.content[b] is None else len(self.free), b)


@dataclass
class Both:
    """Sequences on both pools."""

    pool: BlockPool = field(default_factory=lambda: BlockPool(SIZE))
    physical: Physical = field(default_factory=Physical)
    running: list[tuple[list[Key], int, list[int]]] = field(default_factory=list)

    def start(self, hashes: list[int], private: int, limit: int) -> None:
        """A sequence with all these blocks and some that get no hash, of which the first `limit` may be hits."""
        hits, there = self.pool.leading(hashes, limit), self.physical.leading(hashes[:limit])
        assert len(hits) == len(there)
        new = len(hashes) - len(hits) + private
        fits = self.pool.can_take(hits, new)
        assert fits == (new + sum(b in self.physical.free for b in there) <= len(self.physical.free))
        if fits:
            self._start(hashes, private, hits, there)
        self.check()

    def _start(self, hashes: list[int], private: int, hits: list[Key], there: list[int]) -> None:
        rest = hashes[len(hits) :]
        self.pool.share(hits)
        self.pool.take(len(rest) + private)
        self.physical.share(there)
        taken = self.physical.take(len(rest) + private)
        for block, h in zip(taken, rest, strict=False):
            self.physical.register(block, h)
        self.running.append((hits + self.pool.register(rest), private, there + taken))

    def end(self, which: int) -> None:
        if self.running:
            keys, private, blocks = self.running.pop(which % len(self.running))
            self.pool.release(keys, private)
            self.physical.release(blocks)
        self.check()

    def check(self) -> None:
        """As much is free, and it will be evicted in the same order."""
        order = [key if isinstance(key, int) else key.hash for key in self.pool.idle]
        assert order == [h for b in self.physical.free if (h := self.physical.content[b]) is not None]
        assert self.pool.free == len(self.physical.free)


starts = st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 1), st.integers(0, 2), st.integers(0, 3))
"""Family, its blocks, blocks of its own, private ones, and how many of the last are computed though they may be there."""


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(starts, st.integers(0, 5)), max_size=40))
def test_counts_and_hashes_tell_the_same_as_physical_blocks(moves: list[tuple[int, ...] | int]) -> None:
    both = Both()
    for n, move in enumerate(moves):
        if isinstance(move, int):
            both.end(move)
            continue
        family, shared, own, private, again = move
        hashes = [100 * family + i for i in range(shared)] + [1000 * (n + 1) + i for i in range(own)]
        both.start(hashes, private, max(0, len(hashes) - again))


def test_a_copy_takes_a_place_of_its_own_and_is_hit_when_the_first_is_gone() -> None:
    pool = BlockPool(3)
    for _ in range(2):
        pool.take(1)
        [key] = pool.register([7])
        pool.release([key], 0)
    assert repr(pool) == "<blocks 0/3 used, 2 idle>"
    pool.take(2)  # the blank one and the first with this content
    [copy] = pool.leading([7], 1)
    assert repr(copy) == "<copy of 7>"
    pool.take(1)
    assert pool.leading([7], 1) == []
