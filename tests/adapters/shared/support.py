"""A router that tells what a test says and notes what it learns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from extproc.adapters.shared.board import Board, Channel
from extproc.adapters.shared.pushing import Changes
from extproc.adapters.shared.redis_board import RedisBoard
from extproc.adapters.shared.redis_channel import RedisChannel
from extproc.adapters.shared.sharing import Sharing
from extproc.config import Shared
from extproc.core.prefix.blocks import ENDS
from extproc.core.types import (
    Api,
    Blocks,
    Decision,
    Fact,
    Judgement,
    PeerGone,
    PeerJudged,
    PeerLoad,
    PeerReported,
    PeerServed,
    Placed,
    Prediction,
    TenantServed,
)
from tests.support.waiting import until

POOL = "default"
REPLICA = "10.0.0.1:8000"
QUICK: dict[str, Any] = {
    "beat_s": 0.1,
    "beat_without_push_s": 0.1,
    "expiry_s": 0.8,
    "timeout_s": 0.3,
    "max_pause_s": 0.3,
}


def quick(url: str, **more: Any) -> Shared:
    """Short beats: a test takes a second or two."""
    return Shared(url=url, **{**QUICK, **more})


def placed(*hashes: int, address: str = REPLICA) -> Placed:
    return Placed(POOL, address, Blocks(hashes, ENDS[: len(hashes)]))


def decision() -> Decision:
    """That a request goes to the replica."""
    prediction = Prediction(0, *[0.0] * 6)
    return Decision(0.0, "", POOL, None, Api.CHAT, "", "", (REPLICA,), 1, 1.0, prediction, ())


class Teller:
    """What `core.Router` is to Sharing."""

    def __init__(self, seed: int) -> None:
        self.pools: Mapping[str, Any] = {POOL: None}
        self.loads: tuple[PeerLoad, ...] = (PeerLoad(REPLICA, seed, seed / 2, 100.0 * seed),)
        self.judgements: tuple[Judgement, ...] = ()
        self.tenants: tuple[TenantServed, ...] = ()
        self.to_place: list[Placed] = []
        self.peers: dict[str, dict[type[Fact], Fact]] = {}
        """Peer -> the last fact of each kind; gone with PeerGone."""
        self.reports: list[PeerReported] = []
        """All that were learned."""
        self.placed: list[Placed] = []
        self.changes = Changes()
        clock = lambda: asyncio.get_running_loop().time()  # noqa: E731  # a name for three words
        self.sharing = Sharing(self, self.learn, clock, Random(seed), self.changes)

    def __repr__(self) -> str:
        return f"<{self.sharing!r} {self.sharing.state}>"

    def report(self, pool: str, now: float, only: Collection[str] | None = None) -> tuple[PeerLoad, ...]:
        return tuple(load for load in self.loads if only is None or load.address in only)

    def place(self, requests: int, *placed: Placed) -> None:
        """A request is sent to the replica, which makes so many."""
        self.loads = (PeerLoad(REPLICA, requests, requests / 2, 100.0 * requests),)
        self.to_place += placed
        self.changes.decided(decision())

    def verdicts(self, pool: str, now: float) -> tuple[Judgement, ...]:
        return self.judgements

    def served(self, pool: str) -> tuple[TenantServed, ...]:
        return self.tenants

    def placements(self) -> list[Placed]:
        taken, self.to_place = self.to_place, []
        return taken

    def learn(self, fact: Fact) -> None:
        if isinstance(fact, PeerGone):
            self.peers.pop(fact.peer, None)
        elif isinstance(fact, PeerReported | PeerJudged | PeerServed):
            self.peers.setdefault(fact.peer, {})[type(fact)] = fact
            if isinstance(fact, PeerReported):
                self.reports.append(fact)
        elif isinstance(fact, Placed):
            self.placed.append(fact)

    @property
    def requests(self) -> list[int]:
        """What the others have in flight, as learned."""
        reported = [f for facts in self.peers.values() for f in facts.values() if isinstance(f, PeerReported)]
        return sorted(load.requests for fact in reported for load in fact.loads)

    @property
    def up(self) -> bool:
        return self.sharing.state.up

    def errors(self) -> dict[str, int]:
        return {trouble.value: count for trouble, count in self.sharing.state.errors.items() if count}


@asynccontextmanager
async def sharing(
    teller: Teller, shared: Shared, board: Board | None = None, channel: Channel | None = None
) -> AsyncIterator[Teller]:
    """It shares during the block; by Redis unless there is a board."""
    if board is None:
        name = teller.sharing.name
        board, channel = RedisBoard(shared, name), RedisChannel(shared, name) if shared.push else None
    task = asyncio.create_task(teller.sharing.run(shared, "Redis", board, channel))
    try:
        yield teller
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def pair(shared: Shared) -> AsyncIterator[tuple[Teller, Teller]]:
    """Two routers, 1 and 2 requests in flight, that know of one another."""
    async with sharing(Teller(1), shared) as one, sharing(Teller(2), shared) as two:
        await until(lambda: one.requests == [2] and two.requests == [1])
        yield one, two
