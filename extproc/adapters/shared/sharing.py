"""One router's part in a fleet: publish what it has, read what all others have, and learn it as facts.

A slow beat tells everything, absolute, so that whatever was lost is healed by the next one; what changes between two beats is
pushed to all others at once (`pushing.py`). While pushes do not reach all routers beats come sooner instead.

Runs beside the requests and never in their way. While the store cannot be used the others' shares lapse, and requests are
routed by local knowledge; the tries go on at pauses that grow to a bound, and nothing is kept for later.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Final, Protocol

from extproc.adapters.shared import wire
from extproc.adapters.shared.board import Board, BoardError, Channel
from extproc.adapters.shared.counts import SharingState
from extproc.adapters.shared.others import Others
from extproc.adapters.shared.pushing import Changes, Listener, Speaker
from extproc.config import Shared
from extproc.core.peers import MAX_PLACEMENTS
from extproc.core.types import Fact, Judgement, PeerLoad, Placed, TenantServed

log = logging.getLogger(__name__)

NAME_BITS: Final = 64
BATCHES: Final = 4
"""Of placements, at one beat: 128 KiB."""
LATE_S: Final = 1.0
"""So long pushes may be amiss before the log says so: routers that join and leave are no news."""


class Told(Protocol):
    """What a router tells of itself; `core.Router` is one."""

    @property
    def pools(self) -> Mapping[str, Any]: ...

    def report(self, pool: str, now: float, only: Collection[str] | None = None) -> tuple[PeerLoad, ...]: ...

    def verdicts(self, pool: str, now: float) -> tuple[Judgement, ...]: ...

    def served(self, pool: str) -> tuple[TenantServed, ...]: ...

    def placements(self) -> list[Placed]: ...


class Sharing:
    """Runs the beats of one router, on any board, and its pushes, on any channel."""

    def __init__(
        self,
        router: Told,
        learn: Callable[[Fact], None],
        clock: Callable[[], float],
        rng: Random,
        changes: Changes | None = None,
    ) -> None:
        """`learn` takes each fact; `clock` is the router's, in seconds. The name of this process is drawn from `rng`.

        `changes`: an observer of the router. Without it nothing is pushed but whole states, at each beat.
        """
        self.name = f"{rng.getrandbits(NAME_BITS):016x}"
        self.state = SharingState()
        self._router, self._clock, self._rng = router, clock, rng
        self._changes = changes or Changes()
        self._others = Others(self.name, learn, clock, self.state)
        self._speaker: Speaker | None = None
        self._listener: Listener | None = None
        self._number = 0
        """Of what was said last."""
        self._beats_said: deque[int] = deque([0, 0], maxlen=2)
        """The numbers of the last two beats."""
        self._placed: deque[Placed] = deque(maxlen=MAX_PLACEMENTS)
        """Pushed since the last beat, which tells them again: to who joins, and to those that a push did not reach."""
        self._to_be_whole = False
        self._down_since: float | None = None
        self._deaf_since: float | None = None
        self._deaf_said = False

    def __repr__(self) -> str:
        state = "off" if not self.state.on else "up" if self.state.up else "down"
        return f"<Sharing of {self.name}: {state}, {len(self._others)} peers>"

    @property
    def peers(self) -> int:
        """Other routers that count."""
        return len(self._others)

    @property
    def peer_requests(self) -> int:
        """Requests that they have in flight, over all pools, as of their last beats."""
        return self._others.requests

    async def run(self, shared: Shared, where: str, board: Board, channel: Channel | None = None) -> None:
        """Share until cancelled; then take back what was published, and forget the others. `where` is for the log.

        Without a channel nothing is pushed, and beats come as often as they must then.
        """
        self.state.on = True
        log.info("sharing through %s as %s", where, self.name)
        try:
            async with asyncio.TaskGroup() as tasks:
                if channel is not None:
                    self._speaker = Speaker(shared, channel, self, self.state)
                    self._listener = Listener(shared, channel, self._others.pushed, self.state)
                    tasks.create_task(self._speaker.run())
                    tasks.create_task(self._listener.run())
                    self._changes.tell(self._speaker.stir)
                await self._beats(shared, where, board)
        finally:
            self._changes.tell(None)
            self._speaker = self._listener = None
            self.state.on = self.state.up = self.state.pushing = False
            self._down_since = self._deaf_since = None
            self._deaf_said = False
            self._others.forget_all()
            await board.close(leave=True)

    # --- beats --------------------------------------------------------------------------------------------------------

    async def _beats(self, shared: Shared, where: str, board: Board) -> None:
        pause_s = shared.beat_s
        while True:
            whole = await self._beat(shared, where, board)
            if whole:
                self._look(shared, where)
            pause_s = self._pace_s(shared) if whole else min(2 * pause_s, shared.max_pause_s)
            await self._rest(pause_s * (1.0 - 0.1 * self._rng.random()), shared.expiry_s)

    def _pace_s(self, shared: Shared) -> float:
        """Until the next beat: while pushes do not reach all, it is all that others learn by."""
        return shared.beat_s if self.state.pushing else min(shared.beat_s, shared.beat_without_push_s)

    async def _beat(self, shared: Shared, where: str, board: Board) -> bool:
        """Publish and read. Whether the next may come at the usual time."""
        self.state.beats += 1
        unsaid = self._router.placements()
        data = self._state(unsaid)
        placed = [*self._placed, *unsaid]
        self._placed.clear()
        batches, left_out = wire.batches(placed, BATCHES)
        try:
            heard = await board.beat(data, batches)
        except BoardError as e:
            self.state.placements_left_out += len(placed)
            self.state.pushing = False
            self._failed(e, where)
            return False
        self.state.sent_bytes += len(data) + sum(map(len, batches))
        self.state.placements_left_out += left_out
        self.state.placements_sent += len(placed) - left_out
        # On average: how the beats of two routers lie to one another is chance. Of what was pushed it does not matter.
        await self._others.take(heard, self._pace_s(shared) / 2, shared.expiry_s)
        if heard.refused is not None:
            self._failed(heard.refused, where)
        else:
            self._well(where)
        return True

    def _state(self, unsaid: Sequence[Placed]) -> bytes:
        """What there is to be told now, encoded; it is pushed as well, with placements that were not."""
        self._number += 1
        self._beats_said.append(self._number)
        self._changes.take()
        pools = tuple(self._pools())
        if self._speaker is not None:
            self._to_be_whole = False
            loads = tuple((pool.pool, pool.loads) for pool in pools)
            self._speaker.say(wire.push(wire.Push(self.name, self._number, True, loads, _batch(unsaid))))
        return wire.state(wire.State(self._number, pools, self._says, self._hears))

    def _pools(self) -> Iterator[wire.PoolState]:
        now, router = self._clock(), self._router
        for name in router.pools:
            yield wire.PoolState(name, router.report(name, now), router.verdicts(name, now), router.served(name))

    async def _rest(self, pause_s: float, expiry_s: float) -> None:
        """Wait; meanwhile peers of which nothing could be read for too long are forgotten in time."""
        until = self._clock() + pause_s
        while (left_s := until - (now := self._clock())) > 0:
            silent_at = self._others.next_silent_at(expiry_s)
            next_s = left_s if silent_at is None else silent_at - now
            await asyncio.sleep(min(left_s, max(next_s, 0.01)))
            self._others.forget_silent(expiry_s)

    # --- pushes -------------------------------------------------------------------------------------------------------

    def changed(self) -> bytes | None:
        """A push of the loads that changed since the last word, and of what was placed. See pushing.Talk."""
        changed, placed = self._changes.take(), self._router.placements()
        if not changed and not placed:
            return None
        self._number += 1
        self._placed.extend(placed)
        now, whole, router = self._clock(), self._to_be_whole, self._router
        self._to_be_whole = False
        if whole:
            loads = tuple((name, router.report(name, now)) for name in router.pools)
        else:
            known = [(name, only) for name, only in changed.items() if name in router.pools]  # else a provider's
            loads = tuple((name, router.report(name, now, only)) for name, only in known)
        return wire.push(wire.Push(self.name, self._number, whole, loads, _batch(placed)))

    def lost(self) -> None:
        """The last push did not arrive. See pushing.Talk."""
        self._to_be_whole = True

    @property
    def _says(self) -> bool:
        return self._speaker is not None and self._speaker.error is None

    @property
    def _hears(self) -> bool:
        """Whether all pushes of others arrive here, our own too: that came back of each which the last beat but one read."""
        if self._listener is None or self._listener.error is not None:
            return False
        return self._others.echoed >= self._beats_said[0] > 0 and self._others.all_heard

    def _look(self, shared: Shared, where: str) -> None:
        """Whether pushes do their work; and say so where they should and do not."""
        hears = self._hears
        if hears and self._listener is not None:
            self._listener.well()
        self.state.pushing = hears and self._says and self._others.all_push
        if self.state.pushing or not self.state.up or self._speaker is None:
            if self._deaf_said and self.state.pushing:
                log.info("%s: pushes reach all routers again", where)
                self._deaf_said = False
            self._deaf_since = None
            return
        now = self._clock()
        self._deaf_since = self._deaf_since or now
        if now - self._deaf_since >= LATE_S and not self._deaf_said:
            self._deaf_said = True
            log.warning("%s: %s; going on by beats every %g s", where, self._why_deaf(), self._pace_s(shared))

    def _why_deaf(self) -> str:
        for what, end in (("publish pushes", self._speaker), ("listen to pushes", self._listener)):
            if end is not None and end.error is not None:
                return f"cannot {what}: {end.error.trouble}: {end.error}"
        return "pushes do not reach all routers" if self._hears else "pushes do not arrive here"

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


def _batch(placed: Sequence[Placed]) -> bytes:
    return wire.batch(placed)[0] if placed else b""


def off(router: Told) -> Sharing:
    """Of a process that shares nothing, for the pages of the documentation."""
    return Sharing(router, lambda _fact: None, lambda: 0.0, Random(0))
