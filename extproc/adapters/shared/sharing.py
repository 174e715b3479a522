"""One router's beat: publish what it has, read what all others have, and learn it as facts.

Runs beside the requests and never in their way. While the store cannot be used the others' shares lapse, and requests are
routed by local knowledge; the tries go on at pauses that grow to a bound, and nothing is kept for later: what is published
is absolute, so the first beat that comes through heals all.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Protocol

from extproc.adapters.shared import wire
from extproc.adapters.shared.board import Board, BoardError, Heard, Trouble
from extproc.config import Shared
from extproc.core.types import (
    Fact,
    Judgement,
    PeerGone,
    PeerJudged,
    PeerLoad,
    PeerReported,
    PeerServed,
    Placed,
    TenantServed,
)

log = logging.getLogger(__name__)

AT_ONCE: Final = 64
"""Placements learned before the event loop may do something else: half a millisecond."""
NAME_BITS: Final = 64


class Told(Protocol):
    """What a router tells of itself; `core.Router` is one."""

    @property
    def pools(self) -> Mapping[str, Any]: ...

    def report(self, pool: str, now: float) -> tuple[PeerLoad, ...]: ...

    def verdicts(self, pool: str, now: float) -> tuple[Judgement, ...]: ...

    def served(self, pool: str) -> tuple[TenantServed, ...]: ...

    def placements(self) -> list[Placed]: ...


@dataclass(slots=True)
class SharingState:
    """How it goes, for metrics."""

    on: bool = False
    """Whether anything is to be shared at all."""
    up: bool = False
    """Whether the last beat did all that it should."""
    beats: int = 0
    errors: Counter[Trouble] = field(default_factory=Counter)
    read_at: float | None = None
    """When the others were last read, on the clock of the router; None before the first time."""
    sent_bytes: int = 0
    """Payload: states and placements, encoded."""
    received_bytes: int = 0
    placements_sent: int = 0
    placements_received: int = 0
    placements_left_out: int = 0
    """Not told: too many for one beat, or the store took nothing."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Messages of others passed over: `version` of another release, `unreadable`."""


@dataclass(slots=True)
class _Peer:
    """Another router, as last read."""

    beat: int
    heard_at: float
    """When a new beat of it was first read."""
    pools: frozenset[str]
    requests: int


class Sharing:
    """Runs the beats of one router, on any board."""

    def __init__(self, router: Told, learn: Callable[[Fact], None], clock: Callable[[], float], rng: Random) -> None:
        """`learn` takes each fact; `clock` is the router's, in seconds. The name of this process is drawn from `rng`."""
        self.name = f"{rng.getrandbits(NAME_BITS):016x}"
        self.state = SharingState()
        self._router, self._learn, self._clock, self._rng = router, learn, clock, rng
        self._peers: dict[str, _Peer] = {}
        self._down_since: float | None = None

    def __repr__(self) -> str:
        state = "off" if not self.state.on else "up" if self.state.up else "down"
        return f"<Sharing of {self.name}: {state}, {len(self._peers)} peers>"

    @property
    def peers(self) -> int:
        """Other routers that count."""
        return len(self._peers)

    @property
    def peer_requests(self) -> int:
        """Requests that they have in flight, over all pools."""
        return sum(peer.requests for peer in self._peers.values())

    async def run(self, shared: Shared, where: str, board: Board) -> None:
        """Beat until cancelled; then take back what was published, and forget the others. `where` is for the log."""
        self.state.on = True
        log.info("sharing through %s as %s", where, self.name)
        try:
            pause_s = shared.beat_s
            while True:
                whole = await self._beat(shared, where, board)
                pause_s = shared.beat_s if whole else min(2 * pause_s, shared.max_pause_s)
                await self._rest(pause_s * (1.0 - 0.1 * self._rng.random()), shared.expiry_s)
        finally:
            self.state.on = self.state.up = False
            self._down_since = None
            for name in list(self._peers):
                self._forget(name)
            await board.close(leave=True)

    # --- one beat -----------------------------------------------------------------------------------------------------

    async def _beat(self, shared: Shared, where: str, board: Board) -> bool:
        """Publish and read. Whether the next may come at the usual time."""
        self.state.beats += 1
        data = wire.state(self.state.beats, self._pools())
        placed = self._router.placements()
        batch, left_out = wire.batch(placed) if placed else (None, 0)
        try:
            heard = await board.beat(data, batch)
        except BoardError as e:
            self.state.placements_left_out += len(placed)
            self._failed(e, where)
            return False
        self.state.sent_bytes += len(data) + len(batch or b"")
        self.state.placements_left_out += left_out
        self.state.placements_sent += len(placed) - left_out
        await self._take(heard, shared)
        if heard.refused is not None:
            self._failed(heard.refused, where)
        else:
            self._well(where)
        return True

    def _pools(self) -> Iterator[wire.PoolState]:
        now, router = self._clock(), self._router
        for name in router.pools:
            yield wire.PoolState(name, router.report(name, now), router.verdicts(name, now), router.served(name))

    async def _take(self, heard: Heard, shared: Shared) -> None:
        self.state.read_at = self._clock()
        self.state.received_bytes += sum(map(len, heard.states.values())) + sum(map(len, heard.placed))
        for name in self._peers.keys() - heard.states.keys():
            self._forget(name)
        age_s = shared.beat_s / 2  # on average: how the beats of two routers lie to one another is chance
        for name, data in heard.states.items():
            self._take_state(name, data, age_s)
            await asyncio.sleep(0)  # with many replicas each is a third of a millisecond: others first
        for batch in heard.placed:
            await self._take_batch(batch)

    def _take_state(self, name: str, data: bytes, age_s: float) -> None:
        try:
            beat, pools = wire.read_state(data)
        except (wire.UnknownVersionError, wire.UnreadableError) as e:
            self._ignore(e)
            return
        known = self._peers.get(name)
        if known is not None and known.beat == beat:
            return  # read before
        told = frozenset(pool.pool for pool in pools)
        for gone in known.pools - told if known else ():
            self._learn(PeerGone(gone, name))
        requests = sum(load.requests for pool in pools for load in pool.loads)
        self._peers[name] = _Peer(beat, self._clock(), told, requests)
        for pool in pools:
            self._learn(PeerReported(pool.pool, name, pool.loads, age_s))
            self._learn(PeerJudged(pool.pool, name, pool.judgements))
            self._learn(PeerServed(pool.pool, name, pool.served))

    async def _take_batch(self, batch: bytes) -> None:
        try:
            placed = wire.read_batch(batch)
        except (wire.UnknownVersionError, wire.UnreadableError) as e:
            self._ignore(e)
            return
        self.state.placements_received += len(placed)
        for i, each in enumerate(reversed(placed), 1):  # the latest last, as the index wants them
            self._learn(each)
            if i % AT_ONCE == 0:
                await asyncio.sleep(0)

    def _ignore(self, error: Exception) -> None:
        self.state.ignored["version" if isinstance(error, wire.UnknownVersionError) else "unreadable"] += 1

    # --- peers that are gone ------------------------------------------------------------------------------------------

    async def _rest(self, pause_s: float, expiry_s: float) -> None:
        """Wait; meanwhile peers of which nothing could be read for too long are forgotten in time."""
        until = self._clock() + pause_s
        while (left_s := until - self._clock()) > 0:
            next_s = min((p.heard_at + expiry_s - self._clock() for p in self._peers.values()), default=left_s)
            await asyncio.sleep(min(left_s, max(next_s, 0.01)))
            self._forget_silent(expiry_s)

    def _forget_silent(self, expiry_s: float) -> None:
        now = self._clock()
        for name in [name for name, peer in self._peers.items() if now - peer.heard_at >= expiry_s]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        for pool in self._peers.pop(name).pools:
            self._learn(PeerGone(pool, name))

    # --- how it goes --------------------------------------------------------------------------------------------------

    def _failed(self, error: BoardError, where: str) -> None:
        self.state.errors[error.trouble] += 1
        self.state.up = False
        if self._down_since is None:
            self._down_since = self._clock()
            log.warning("%s: %s: %s; going on by local knowledge", where, error.trouble, error)

    def _well(self, where: str) -> None:
        self.state.up = True
        if self._down_since is not None:
            log.info("%s: well again after %.1f s", where, self._clock() - self._down_since)
            self._down_since = None


def off(router: Told) -> Sharing:
    """Of a process that shares nothing, for the pages of the documentation."""
    return Sharing(router, lambda _fact: None, lambda: 0.0, Random(0))
