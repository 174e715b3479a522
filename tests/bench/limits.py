"""How much more than its limit a tenant gets from several routers that share it through a real Redis.

Each router is its own meters, leases and connection, driven as fast as it can by a client that takes whatever it is given: all of them at once,
and, which is worse, one after the other, so that each begins without a lease when the limit is used up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from extproc.adapters.leasing import Leasing
from extproc.adapters.shared.redis_limits import RedisStore
from extproc.config import Shared
from extproc.core.account import Account, Rate
from extproc.core.admission import leases
from extproc.core.admission.limits import Limits, Sharing
from extproc.core.types import Request
from tests.support.redis import RedisServer
from tests.support.waiting import until

ROUTERS = 4
RATE = Rate(per_minute=1200, burst=300)
"""20 a second after a burst, so that a run of seconds sees both."""
SECONDS = 4.0
PAUSE_S = 0.002
"""Of each router's clients between two tries."""


class Router:
    """What of a router counts requests."""

    def __init__(self, shared: Shared, name: str, routers: int, strict: bool = False) -> None:
        self.limits = Limits()
        self.limits.sharing = Sharing(strict=strict)
        self.limits.routers = lambda: routers
        self.leasing = Leasing(self.limits, RedisStore(shared, name))
        self.admitted = 0
        self.tries = 0

    def request(self, account: Account) -> bool:
        """One request; whether it was admitted."""
        self.tries += 1
        now = time.monotonic()
        if self.limits.check(Request(account=account), 1, 1.0, now) is not None:
            return False
        self.admitted += 1
        self.limits.take(f"f{self.admitted}", account, 2.0, now)
        return True


@asynccontextmanager
async def fleet(url: str, count: int, *, strict: bool = False) -> AsyncIterator[list[Router]]:
    """So many routers that share, ready."""
    shared = Shared(url=url)
    routers = [Router(shared, f"r{i}", count, strict) for i in range(count)]
    tasks = [asyncio.create_task(router.leasing.run()) for router in routers]
    try:
        await until(lambda: not any(router.limits.away for router in routers))
        yield routers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def flood(routers: Sequence[Router], account: Account, seconds: float) -> None:
    """Every router gets as many requests as it can answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for router in routers:
            router.request(account)
        await asyncio.sleep(PAUSE_S)


async def in_turn(routers: Sequence[Router], account: Account, seconds: float) -> None:
    """One router after the other, each until it has refused for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for router in routers:
            refused = 0
            while refused < 20 and time.monotonic() < end:
                refused = 0 if router.request(account) else refused + 1
                await asyncio.sleep(PAUSE_S)


async def measured(url: str, routers: int = ROUTERS, seconds: float = SECONDS) -> dict[str, float]:
    """Admitted above what the rate allows in that time, as a share of the limit, by how the requests come."""
    found = {}
    async with fleet(url, routers) as members:
        for way in (flood, in_turn):
            account = Account(way.__name__, "t", requests=RATE)
            before, began = sum(r.admitted for r in members), time.monotonic()
            await way(members, account, seconds)
            allowed = RATE.burst + (time.monotonic() - began) / RATE.interval_s
            admitted = sum(r.admitted for r in members) - before
            found[way.__name__] = (admitted - allowed) / RATE.per_minute
    return found


def overshoot() -> float:
    """The worst of the ways, as a share of the limit a minute: what `make bench-fleet` reports. Starts a Redis of its own."""

    async def run() -> float:
        async with RedisServer() as server:
            return max((await measured(server.url)).values())

    return asyncio.run(run())


def bound() -> float:
    """What the documentation promises."""
    return leases.overshoot(RATE, ROUTERS)


if __name__ == "__main__":
    print(json.dumps({"limit_overshoot": round(overshoot(), 4), "bound": round(bound(), 4)}))
