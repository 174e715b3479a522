"""The SGLang router: a tree of who was sent what, and a switch that forgets it while the fleet is out of balance."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from random import Random

from extproc.core.fleet import Member
from extproc.core.policies.base import Ranked, Ranking, Terms
from extproc.core.prediction import Ask
from extproc.core.types import Blocks
from tests.bench.baselines.ties import first

_score = itemgetter(0)


class Tree:
    """Blocks of all prompts sent, each with the workers that it was sent to, the first of them first. Sizes are bytes.

    Along a chain, from its head: no block is older than the next, so what is left of it is always its head; and whoever was
    sent a block was sent those before.
    """

    __slots__ = ("_blocks", "_workers", "held_bytes")

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, tuple[int, tuple[str, ...]]] = OrderedDict()
        self._workers: set[str] = set()
        self.held_bytes = 0

    def __len__(self) -> int:
        """Blocks."""
        return len(self._blocks)

    def match(self, blocks: Blocks) -> tuple[int, tuple[str, ...]]:
        """Bytes of the prompt's head that were sent before to anyone, and to whom."""
        depth = self._depth(blocks.hashes)
        return (blocks.ends[depth - 1], self._blocks[blocks.hashes[depth - 1]][1]) if depth else (0, ())

    def insert(self, blocks: Blocks, worker: str, worker_bytes: int) -> None:
        """The worker is sent the prompt. Beyond `worker_bytes` for each worker, what was sent longest ago is dropped."""
        known, hashes, ends = self._blocks, blocks.hashes, blocks.ends
        self._workers.add(worker)
        depth = self._depth(hashes)
        # From the tail to the head, so that the head ends up most recent.
        for i in range(len(hashes) - 1, depth - 1, -1):
            size = ends[i] - (ends[i - 1] if i else 0)
            known[hashes[i]] = (size, (worker,))
            self.held_bytes += size
        while depth:
            depth -= 1
            size, workers = known[hashes[depth]]
            known.move_to_end(hashes[depth])
            if worker in workers:
                break
            known[hashes[depth]] = (size, (*workers, worker))
        for block in reversed(hashes[:depth]):
            known.move_to_end(block)
        while self.held_bytes > worker_bytes * len(self._workers):
            self.held_bytes -= known.popitem(last=False)[1][0]

    def _depth(self, hashes: tuple[int, ...]) -> int:
        """How many blocks of the chain are known."""
        known = self._blocks
        return bisect_left(hashes, True, key=lambda block: block not in known)


@dataclass(slots=True)
class SglangCacheAware:
    """`cache_aware` of the SGLang router 0.3.2, with the defaults of its command line.

    1. Out of balance (max - min > 64 and max > 1.5 x min requests in flight): the least loaded, the first of equals.
    2. If more than 0.3 of the prompt was sent before, to whomever: the worker that was sent it first.
    3. Otherwise the least loaded, the first of equals.

    The tree is its own, not our index: it takes in every decision, knows nothing of what engines evict, and gives a
    prefix to its first owner for as long as that one is a member. Simplified: blocks in place of characters; eviction at
    insertion, by the sum over all workers, in place of a sweep every 60 s; a first owner that is gone gives way to the next
    that was sent the same, and then to the least loaded.
    """

    name = "sglang_cache_aware"
    cache_threshold: float = 0.3
    """Share of the prompt that must have been sent before."""
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    max_tree_size: int = 67_108_864
    """Characters for each worker."""
    _tree: Tree = field(default_factory=Tree, init=False)

    def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
        ranked: Ranked = [(float(len(m.load)), m) for m in members]
        ranked.sort(key=_score)  # stable: the first of equals stays first
        low, high = ranked[0][0], ranked[-1][0]
        if high - low > self.balance_abs_threshold and high > self.balance_rel_threshold * low:
            return Ranking(ranked, "imbalanced")
        matched, workers = self._tree.match(ask.request.blocks)
        if matched > self.cache_threshold * (ask.request.prompt_bytes or 0):
            present = {m.replica.address: m for m in members}
            for worker in workers:
                if worker in present:
                    return Ranking(first(present[worker], ranked), "match")
        return Ranking(ranked, "no_match")

    def took(self, ask: Ask, member: Member) -> None:
        self._tree.insert(ask.request.blocks, member.replica.address, self.max_tree_size)

    def terms(self, ask: Ask, member: Member, now: float) -> Terms:
        return {"in_flight": float(len(member.load))}
