"""Leases between routers: against a store in memory, and against a real Redis that hangs, dies and forgets."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from extproc.adapters.leasing import FakeStore, Leasing, StoreError
from extproc.adapters.shared.redis_limits import RedisStore
from extproc.config import Shared
from extproc.core.account import Account, Most, Rate
from extproc.core.admission.in_flight import TOLD_S, Held
from extproc.core.admission.leases import Ask, Told
from extproc.core.admission.limits import Limits, Loss, Sharing
from extproc.core.types import Refusal, Request
from tests.bench.limits import fleet
from tests.support.redis import RedisServer
from tests.support.waiting import until

ACCOUNT = Account("t", "free", requests=Rate(10, 10))
ROUTERS = 4


def limits(strict: bool = False, loss: Loss = Loss.OPEN) -> Limits:
    made = Limits()
    made.sharing = Sharing(strict=strict, loss=loss)
    return made


def ask(made: Limits, account: Account = ACCOUNT) -> Refusal | None:
    """One request, now."""
    now = time.monotonic()
    reject = made.check(Request(account=account), 1, 0.0, now)
    if reject is None:
        made.take(f"f{now}", account, 1.0, now)
    return None if reject is None else reject.refusal


@asynccontextmanager
async def running(leasing: Leasing) -> AsyncIterator[None]:
    task = asyncio.create_task(leasing.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# --- with a store in memory -------------------------------------------------------------------------------------------


async def test_a_request_makes_no_round_trip() -> None:
    made, store = limits(), FakeStore()
    leasing = Leasing(made, store, max_pause_s=0.01)
    async with running(leasing):
        await until(lambda: not made.away)
        calls = store.calls
        assert ask(made) is None
        assert store.calls == calls, "it was decided before anything was asked"
        await until(lambda: store.calls > calls)


async def test_while_the_store_is_away_nobody_waits_and_it_is_found_again() -> None:
    made, store = limits(), FakeStore(away=True)
    leasing = Leasing(made, store, max_pause_s=0.01)
    async with running(leasing):
        await until(lambda: leasing.failures >= 3)
        assert made.away
        assert [ask(made) for _ in range(11)] == [None] * 10 + [Refusal.RATE_LIMITED], "its own meter holds"
        failures = leasing.failures
        await until(lambda: leasing.failures >= failures + 2)
        store.away = False
        await until(lambda: not made.away)
        await until(lambda: store.tats != {})
        assert store.tats["t", "requests", ""] == pytest.approx(60.0), "what passed meanwhile was charged"


@pytest.mark.parametrize(("loss", "then"), [(Loss.OPEN, None), (Loss.CLOSED, Refusal.LIMITS_UNKNOWN)])
async def test_strict_limits_wait_for_a_lease_but_not_for_ever(loss: Loss, then: Refusal | None) -> None:
    made = limits(strict=True, loss=loss)
    store = Slow()
    leasing = Leasing(made, store, strict_wait_s=0.2)
    async with running(leasing):
        await until(lambda: not made.away)
        store.delay_s = 0.02
        assert ask(made) is Refusal.RATE_LIMITED, "without waiting there is nothing"
        await leasing.before([ACCOUNT])
        assert ask(made) is None
        store.delay_s = 60.0
        other = Account("other", "free", requests=Rate(10, 10))
        async with asyncio.timeout(5):
            await leasing.before([other])
        assert ask(made, other) is then


async def test_what_was_under_way_when_settings_changed_is_asked_again() -> None:
    made, store = limits(), Slow()
    async with running(Leasing(made, store)):
        await until(lambda: not made.away)
        store.delay_s = 60.0
        assert ask(made) is None
        await until(lambda: any(lease.asked_at is not None for lease in made._leases.values()))
    assert store.tats == {}, "it was cut off"
    store.delay_s = 0.0
    async with running(Leasing(made, store)):
        await until(lambda: store.tats != {})
        assert store.tats["t", "requests", ""] == pytest.approx(6.0), "what passed is charged"
        calls = store.calls
        assert ask(made) is None
        await until(lambda: store.calls > calls)


class Slow(FakeStore):
    """Takes its time."""

    delay_s = 0.0

    async def lease(self, asks: Sequence[Ask]) -> list[Told]:
        await asyncio.sleep(self.delay_s)
        return await super().lease(asks)


# --- with a real Redis ------------------------------------------------------------------------------------------------


async def test_the_script_does_what_the_store_in_memory_does() -> None:
    async with RedisServer() as redis:
        real, fake = RedisStore(Shared(url=redis.url), "r"), FakeStore()
        asks = [
            Ask(("t", "requests", ""), Rate(10, 10), charge, want, routers)
            for charge, want, routers in [
                (1.0, 5, 4),
                (0.0, 100, 1),
                (2.0, 5, 1),
                (-3.0, 1, 1),
                (0.0, 10, 2),
                (-99.0, 0, 1),
            ]
        ]
        for one in asks:
            [told], [expected] = await real.lease([one]), await fake.lease([one])
            assert told.granted == expected.granted
            assert told.full_in_s == pytest.approx(expected.full_in_s, abs=0.5)
        several = [Ask((f"t{i}", "tokens", "m"), Rate(6000.5, 6000), 1.5, 10, 1) for i in range(20)]
        assert [t.granted for t in await real.lease(several)] == [10.0] * 20
        names = sorted(await redis.command("KEYS", "*"))
        assert b"extproc:1:limit:tokens:{t0}:m" in names
        assert all([0 < await redis.command("PTTL", name) <= 61_000 for name in names])
        await redis.command("SCRIPT", "FLUSH")
        assert len(await real.lease(several)) == 20
        assert len(await real.lease(several[:1])) == 1
        await real.close()


async def test_counts_of_what_is_in_flight_are_absolute_and_lapse() -> None:
    key, other = ("t", "in_flight", ""), ("t", "in_flight", "m")
    async with RedisServer() as redis:
        a, b = RedisStore(Shared(url=redis.url), "a"), RedisStore(Shared(url=redis.url), "b")
        assert await a.hold([Held(key, 2), Held(other, 1)]) == [0, 0]
        assert await b.hold([Held(key, 1), Held(other, 0)]) == [2, 1]
        assert await a.hold([Held(key, 3)]) == [1], "its own is not among the others'"
        assert await b.hold([Held(key, 0)]) == [3]
        assert await redis.command("KEYS", "*") != []
        name = "extproc:1:limit:in_flight:{t}"
        assert 0 < await redis.command("PTTL", name) <= TOLD_S * 1000
        stale = {"dead": [7, 0], "a": [3, 2**42]}
        await redis.command("SET", name, json.dumps(stale))
        assert await b.hold([Held(key, 0)]) == [3], "the dead one's word has lapsed"
        assert await a.hold([Held(key, 0), Held(other, 0)]) == [0, 0]
        assert await redis.command("KEYS", "*") == []
        await a.close()
        await b.close()


async def test_what_is_in_flight_is_told_and_what_the_others_have_heard() -> None:
    made, store = limits(), FakeStore()
    two = Account("t", "free", in_flight=Most(2))
    key = ("t", "in_flight", "")
    store.others[key] = 1
    async with running(Leasing(made, store, max_pause_s=0.01)):
        await until(lambda: not made.away)
        assert ask(made, two) is None
        await until(lambda: store.held == {key: 1})
        assert ask(made, two) is Refusal.CONCURRENCY
        store.away = True
        await until(lambda: made.away)
        await until(lambda: made.in_flight.of(key, time.monotonic()) == 1, timeout_s=3 * TOLD_S)
        assert ask(made, two) is None, "it goes by its own count"


async def test_a_redis_that_does_not_answer_is_told_apart_from_one_that_does() -> None:
    async with RedisServer() as redis:
        store = RedisStore(Shared(url=redis.url, timeout_s=0.2), "r")
        one = [Ask(("t", "requests", ""), Rate(10, 10), 1.0, 1, 1)]
        await store.lease(one)
        redis.pause()
        with pytest.raises(StoreError):
            await store.lease(one)
        redis.resume()
        await store.lease(one)
        await redis.kill()
        with pytest.raises(StoreError):
            await store.lease(one)
        await redis.start()
        assert (await store.lease(one))[0].granted == 1.0
        await store.close()


async def test_a_redis_that_is_full_counts_as_away() -> None:
    async with RedisServer("--maxmemory", "1", "--maxmemory-policy", "noeviction") as redis:
        store = RedisStore(Shared(url=redis.url), "r")
        with pytest.raises(StoreError, match="OutOfMemory"):
            await store.lease([Ask(("t", "requests", ""), Rate(10, 10), 1.0, 1, 1)])
        await redis.command("CONFIG", "SET", "maxmemory", "0")
        assert len(await store.lease([Ask(("t", "requests", ""), Rate(10, 10), 1.0, 1, 1)])) == 1
        await store.close()


async def test_the_rights_that_are_documented_are_enough() -> None:
    async with RedisServer() as redis:
        page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
        [base] = re.findall(r"ACL SETUSER router (on >PASSWORD .*)", page)
        [more] = re.findall(r"`(~extproc:1:limit:.*?)`", page)
        await redis.command("ACL", "SETUSER", "router", *base.split(), *more.split())
        store = RedisStore(Shared(url=f"redis://router:PASSWORD@127.0.0.1:{redis.port}"), "r")
        asks = [Ask((f"t{i}", "requests", ""), Rate(10, 10), 1.0, 1, 1) for i in range(2)]
        assert await store.lease([]) == []
        assert len(await store.lease(asks)) == 2
        await store.lease([Ask(("t0", "requests", ""), Rate(10, 10), -10.0, 0, 1)])
        assert await store.hold([Held(("t0", "in_flight", ""), 1)]) == [0]
        assert await store.hold([Held(("t0", "in_flight", ""), 0)]) == [0]
        await store.close()


async def test_a_cluster_spreads_the_meters() -> None:
    options = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
    async with RedisServer(*options) as one, RedisServer(*options) as other:
        await one.command("CLUSTER", "ADDSLOTSRANGE", 0, 8000)
        await other.command("CLUSTER", "ADDSLOTSRANGE", 8001, 16383)
        await one.command("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus_port)
        for node in (one, other):
            await until(lambda node=node: whole(node), timeout_s=20)  # type: ignore[misc]
        store = RedisStore(Shared(url=f"redis+cluster://127.0.0.1:{one.port}"), "r")
        asks = [Ask((f"t{i}", "requests", ""), Rate(10, 10), 1.0, 4, 1) for i in range(20)]
        assert [told.granted for told in await store.lease(asks)] == [4.0] * 20
        assert [told.granted for told in await store.lease(asks)] == [4.0] * 20
        assert [told.granted for told in await store.lease(asks[:1])] == [0.0]
        sizes = [await node.command("DBSIZE") for node in (one, other)]
        assert sum(sizes) == 20
        assert min(sizes) > 0
        await store.close()


async def whole(node: RedisServer) -> bool:
    """Whether the node sees a Cluster that has all slots."""
    info = str(await node.command("CLUSTER", "INFO"))
    return "cluster_known_nodes:2" in info and "cluster_state:ok" in info and "cluster_slots_ok:16384" in info


async def test_ten_requests_at_once_on_four_routers_are_ten_where_limits_are_strict() -> None:
    async with RedisServer() as redis, fleet(redis.url, ROUTERS, strict=True) as members:

        async def one(i: int) -> bool:
            router = members[i % ROUTERS]
            await router.leasing.before([ACCOUNT])
            return router.request(ACCOUNT)

        assert sum(await asyncio.gather(*(one(i) for i in range(40)))) == 10


async def test_a_limit_that_one_router_used_up_holds_on_the_others() -> None:
    async with RedisServer() as redis, fleet(redis.url, ROUTERS) as members:
        first, *others = members
        await until(lambda: first.request(ACCOUNT) and first.admitted == 10)
        await until(lambda: first.limits._leases["t", "requests", ""].open_at > time.monotonic())
        over = 0
        for router in others:
            over += router.request(ACCOUNT)  # on credit
            rounds = router.leasing.rounds
            await until(lambda router=router, rounds=rounds: router.leasing.rounds > rounds)  # type: ignore[misc]
            assert not router.request(ACCOUNT)
        assert over <= len(others), "one request for each router, as promised for tiny limits"
