"""The other routers, as their messages tell of them: each message becomes facts.

What a router says comes by two ways, its state by beats and pushes by the channel, and one may overtake the other. Its words are
numbered, so the core knows what is news (`PeerReported.number`); here the numbers tell whether pushes arrive at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from extproc.adapters.shared import wire
from extproc.adapters.shared.board import Heard
from extproc.adapters.shared.counts import SharingState
from extproc.core.types import Fact, PeerGone, PeerJudged, PeerReported, PeerServed

AT_ONCE: Final = 64
"""Placements learned before the event loop may do something else: half a millisecond."""
UNREAD: Final = -1
"""The number of no word."""


@dataclass(slots=True)
class Peer:
    """Another router."""

    number: int
    """Of its state as last read."""
    heard_at: float
    """When a new state of it was first read."""
    pools: frozenset[str]
    requests: int
    says: bool = False
    """Whether it pushes."""
    hears: bool = False
    """Whether the pushes of all others reach it."""
    before: int = UNREAD
    """Number of the state read before this one."""
    pushed: int = UNREAD
    """Number of its last push that arrived."""
    lost_at: float = 0.0
    """When it was last seen that a push of it is missing; at first when it was first heard of."""


class Others:
    """All that is heard of other routers."""

    def __init__(
        self, name: str, learn: Callable[[Fact], None], clock: Callable[[], float], state: SharingState
    ) -> None:
        """`name` is our own; `learn` takes each fact."""
        self._name, self._learn, self._clock, self._state = name, learn, clock, state
        self._peers: dict[str, Peer] = {}
        self.echoed = UNREAD
        """Number of our own last push that came back."""

    def __repr__(self) -> str:
        return f"<others {list(self._peers)}>"

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def requests(self) -> int:
        """What they have in flight, over all pools."""
        return sum(peer.requests for peer in self._peers.values())

    @property
    def all_heard(self) -> bool:
        """Whether of each that pushes a push came that is no older than what the last beat but one read of it."""
        return all(peer.pushed >= peer.before for peer in self._peers.values() if peer.says)

    @property
    def all_push(self) -> bool:
        """Whether each of them pushes, and hears what all others push."""
        return all(peer.says and peer.hears for peer in self._peers.values())

    # --- what a beat brought ------------------------------------------------------------------------------------------

    async def take(self, heard: Heard, age_s: float, keep_s: float) -> None:
        """Learn all of it. States are `age_s` old on average; placements of a router of which no push was lost for `keep_s` are
        known from these.
        """
        self._state.read_at = self._clock()
        self._state.received_bytes += sum(map(len, heard.states.values())) + sum(len(b) for _, b in heard.placed)
        self.forget(self._peers.keys() - heard.states.keys())
        for name, data in heard.states.items():
            self._take_state(name, data, age_s)
            await asyncio.sleep(0)  # with many replicas each is a third of a millisecond: others first
        now = self._clock()
        for name, batch in heard.placed:
            peer = self._peers.get(name)
            if peer is None or not peer.says or heard.behind or now - peer.lost_at < keep_s:
                await self._take_batch(batch)
        if heard.behind:  # what is still to be read may be from before we heard any push
            for peer in self._peers.values():
                peer.lost_at = now

    def _take_state(self, name: str, data: bytes, age_s: float) -> None:
        try:
            told = wire.read_state(data)
        except (wire.UnknownVersionError, wire.UnreadableError) as e:
            self._ignore(e)
            return
        known = self._peers.get(name)
        if known is None:
            known = self._peers[name] = Peer(UNREAD, self._clock(), frozenset(), 0, lost_at=self._clock())
        if known.number == told.number:
            return  # read before
        pools = frozenset(pool.pool for pool in told.pools)
        for gone in known.pools - pools:
            self._learn(PeerGone(gone, name))
        known.before, known.number, known.heard_at, known.pools = known.number, told.number, self._clock(), pools
        known.requests = sum(load.requests for pool in told.pools for load in pool.loads)
        known.says, known.hears = told.says, told.hears
        for pool in told.pools:
            self._learn(PeerReported(pool.pool, name, pool.loads, age_s, told.number))
            self._learn(PeerJudged(pool.pool, name, pool.judgements))
            self._learn(PeerServed(pool.pool, name, pool.served))

    async def _take_batch(self, batch: bytes) -> None:
        try:
            placed = wire.read_batch(batch)
        except (wire.UnknownVersionError, wire.UnreadableError) as e:
            self._ignore(e)
            return
        self._state.placements_received += len(placed)
        for i, each in enumerate(reversed(placed), 1):  # the latest last, as the index wants them
            self._learn(each)
            if i % AT_ONCE == 0:
                await asyncio.sleep(0)

    def _ignore(self, error: Exception) -> None:
        self._state.ignored["version" if isinstance(error, wire.UnknownVersionError) else "unreadable"] += 1

    # --- what was pushed ----------------------------------------------------------------------------------------------

    async def pushed(self, data: bytes) -> None:
        """A push came: of this router itself, of one that is known by its state, or of one that will be."""
        try:
            said = wire.read_push(data)
        except (wire.UnknownVersionError, wire.UnreadableError) as e:
            self._ignore(e)
            return
        if said.router == self._name:
            self.echoed = said.number
            return
        self._state.pushes_received += 1
        self._state.received_bytes += len(data)
        peer = self._peers.get(said.router)
        if peer is None:
            return  # whoever is known by pushes alone would have to be forgotten by them as well
        if peer.pushed != UNREAD and said.number != peer.pushed + 1:
            self._state.pushes_lost += max(said.number - peer.pushed - 1, 1)
            peer.lost_at = self._clock()
        peer.pushed = max(peer.pushed, said.number)
        for pool, loads in said.loads:
            self._learn(PeerReported(pool, said.router, loads, 0.0, said.number, said.whole))
        if said.batch:
            await self._take_batch(said.batch)

    def forget(self, names: Collection[str]) -> None:
        """These are gone."""
        for name in list(names):
            for pool in self._peers.pop(name).pools:
                self._learn(PeerGone(pool, name))

    def next_silent_at(self, expiry_s: float) -> float | None:
        """When the first of them will have been silent for too long; None without any."""
        return min((peer.heard_at + expiry_s for peer in self._peers.values()), default=None)

    def forget_silent(self, expiry_s: float) -> None:
        """Of those nothing new could be read for too long."""
        now = self._clock()
        self.forget([name for name, peer in self._peers.items() if now - peer.heard_at >= expiry_s])

    def forget_all(self) -> None:
        self.forget(list(self._peers))
