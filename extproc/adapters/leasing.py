"""Leases of limits that several routers keep together: asked for off the request path, many in one round trip. `shared/redis_limits.py` is
the store in Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from extproc.core.account import Account
from extproc.core.admission.in_flight import Held
from extproc.core.admission.leases import Ask, Key, Told
from extproc.core.admission.limits import Limits

log = logging.getLogger(__name__)

BEAT_S: Final = 0.1
"""How often leases that ended are given back, when nothing else calls for Redis."""
PROBE_S: Final = 1.0
"""How long a store that nothing was asked of is taken to be there."""
PAUSE_S: Final = 0.002
"""Between two rounds: what comes meanwhile shares the next."""
BATCH: Final = 500
"""Most meters in one round trip."""


class StoreError(Exception):
    """The store did not answer; the text says why, without any password."""


class Store(Protocol):
    """Where meters that several routers share are kept."""

    async def lease(self, asks: Sequence[Ask]) -> list[Told]:
        """Answer them, in order. Raises StoreError."""

    async def hold(self, held: Sequence[Held]) -> list[int]:
        """Keep what this router has in flight, in the place of what it said before; how many the others have of each. Raises StoreError."""

    async def close(self) -> None:
        """Let go of connections."""


@dataclass
class FakeStore:
    """Meters in memory, for several routers of one process; `now` in seconds is set by the test, and `away` lets calls fail."""

    now: float = 0.0
    away: bool = False
    calls: int = 0
    tats: dict[Key, float] = field(default_factory=dict)
    held: dict[Key, int] = field(default_factory=dict)
    """In flight, as last told by anyone."""
    others: dict[Key, int] = field(default_factory=dict)
    """What is answered to that."""

    async def lease(self, asks: Sequence[Ask]) -> list[Told]:
        self.calls += 1
        if self.away:
            raise StoreError("away")
        return [self._lease(ask) for ask in asks]

    async def hold(self, held: Sequence[Held]) -> list[int]:
        if self.away:
            raise StoreError("away")
        self.held.update((each.key, each.count) for each in held)
        return [self.others.get(each.key, 0) for each in held]

    async def close(self) -> None:
        pass

    def _lease(self, ask: Ask) -> Told:
        """The script of `shared/redis_limits.py`, step for step."""
        interval, burst = ask.rate.interval_s, ask.rate.burst
        tat = max(max(self.tats.get(ask.key, 0.0), self.now) + ask.charge * interval, self.now)
        free = (self.now + burst * interval - tat + 1e-6) // interval
        granted = max(min(ask.want, free, max(-(-free // ask.routers), 1)), 0)
        tat += granted * interval
        self.tats[ask.key] = tat
        return Told(ask.key, granted, tat - self.now)


class Leasing:
    """Keeps the leases of one router: asks the store when the core has something to ask."""

    def __init__(
        self,
        limits: Limits,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
        *,
        strict_wait_s: float = 0.1,
        max_pause_s: float = 5.0,
    ) -> None:
        """`limits.sharing` must be set. `max_pause_s`: longest time between two tries while the store is away."""
        self._limits, self._store, self._clock = limits, store, clock
        self._strict_wait_s, self._max_pause_s = strict_wait_s, max_pause_s
        self._due = asyncio.Event()
        self._wanted: Counter[Key] = Counter()
        self._swept_at = self._answered_at = float("-inf")
        self._answered = asyncio.Event()
        self.rounds = 0
        """Round trips."""
        self.failures = 0
        """Of these, those that brought nothing."""
        limits.wake = self._due.set

    def __repr__(self) -> str:
        return f"<Leasing {self._limits!r}, {self.rounds} rounds, {self.failures} failed>"

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = PAUSE_S
        try:
            while True:
                self._due.clear()
                if await self._round():
                    pause_s = PAUSE_S
                    await asyncio.sleep(pause_s)
                else:
                    pause_s = min(max(2 * pause_s, BEAT_S), self._max_pause_s)
                    await asyncio.sleep(pause_s)
                    continue  # to see whether the store is back, even if nothing is due
                await self._waited()
        finally:
            await self._store.close()

    async def before(self, accounts: Sequence[Account]) -> None:
        """Strict limits: have a lease on each meter of these accounts, or be told that there is none.

        At most `strict_wait_s` seconds, and not at all while the store is away. A store that takes longer counts as away until it answers.
        """
        limits, deadline = self._limits, self._clock() + self._strict_wait_s
        while not limits.away and (lacking := limits.lacks(accounts, self._clock())):
            left_s = max(deadline - self._clock(), 0.0)
            self._wanted.update(lacking)
            answered = self._answered
            self._due.set()
            try:
                async with asyncio.timeout(left_s):
                    await answered.wait()
            except TimeoutError:
                limits.away = True

    async def _waited(self) -> None:
        """Until something is due, or leases may have ended."""
        try:
            async with asyncio.timeout(BEAT_S):
                await self._due.wait()
        except TimeoutError:
            pass

    async def _round(self) -> bool:
        """Ask what there is to ask; whether the store answered, or need not."""
        limits, wanted = self._limits, self._wanted
        self._wanted, answered = Counter(), self._answered
        now = self._clock()
        if sweep := now >= self._swept_at + BEAT_S:
            self._swept_at = now
        asks, held, was_away = limits.asks(now, wanted, sweep), limits.in_flight.reports(now), limits.away
        try:
            if asks or limits.away or now >= self._answered_at + PROBE_S:
                for i in range(0, max(len(asks), 1), BATCH):
                    await self._ask(asks[i : i + BATCH])
            for i in range(0, len(held), BATCH):
                await self._tell(held[i : i + BATCH])
        except BaseException as e:
            limits.unheard(asks)  # also when cancelled, for other settings: whoever asks next asks for these again
            limits.in_flight.unheard(held)
            if not isinstance(e, StoreError):
                raise
            self.failures += 1
            if self.failures == 1 or not was_away:
                log.warning("limits are not shared: %s", e)
            return False
        finally:
            self._answered = asyncio.Event()
            answered.set()
        return True

    async def _ask(self, batch: Sequence[Ask]) -> None:
        self.rounds += 1
        told = await self._store.lease(batch)
        self._answered_at = self._clock()
        if self._limits.away:
            log.info("limits are shared")
        self._limits.told(told, self._clock())

    async def _tell(self, batch: Sequence[Held]) -> None:
        self.rounds += 1
        others = await self._store.hold(batch)
        self._answered_at = self._clock()
        self._limits.in_flight.told(batch, others, self._answered_at)
