"""Sharing by a real Redis: what is heard, what a fault does, and that it heals by itself."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from extproc.adapters.shared.board import PLACEMENTS_KEPT, Trouble
from extproc.core.types import Judgement, PeerJudged, PeerServed, TenantServed
from tests.adapters.shared.support import POOL, REPLICA, Teller, pair, placed, quick, sharing
from tests.support.ports import free_port
from tests.support.redis import RedisServer
from tests.support.relay import Relay
from tests.support.waiting import until

KEYS = "{extproc}:1:"


PUSHED: dict[str, Any] = {"beat_s": 0.5, "beat_without_push_s": 0.1, "expiry_s": 1.5}
"""Beats so slow that what comes sooner was pushed."""


async def keys(redis: RedisServer) -> dict[str, int]:
    """Every key with the milliseconds that it has left; -1 for ever."""
    names = [name.decode() for name in await redis.command("KEYS", "*")]
    return {name: await redis.command("PTTL", name) for name in names}


async def test_routers_hear_of_loads_judgements_tenants_and_placements() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        one.judgements = (Judgement(REPLICA, out=True, draining=False, ends_in_s=2.5),)
        one.tenants = (TenantServed("gold", 10, 1234.0), TenantServed(None, -1, 7.0))
        one.to_place = [placed(1, 2, 3), placed(1, 2, 9)]
        await until(lambda: two.placed)
        await until(lambda: two.peers[one.sharing.name][PeerServed].tenants)  # type: ignore[union-attr]
        told = two.peers[one.sharing.name]
        assert told[PeerJudged] == PeerJudged(POOL, one.sharing.name, one.judgements)
        assert told[PeerServed] == PeerServed(POOL, one.sharing.name, one.tenants)
        assert two.placed[:2] == [
            placed(1, 2, 3),
            placed(1, 2, 9),
        ]  # by the push; by the beat once more, to who just joined
        assert one.placed == []
        assert one.up
        assert not one.errors()


async def test_every_key_expires_and_has_the_prefix_and_the_schema() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        one.to_place = [placed(1)]
        await until(lambda: two.placed)
        left = await keys(redis)
        states = {f"{KEYS}state:{teller.sharing.name}" for teller in (one, two)}
        assert set(left) == {f"{KEYS}routers", f"{KEYS}placed", *states}
        assert all(0 < ms <= 60_000 for ms in left.values()), left
        assert all(left[key] <= 800 for key in states)


async def test_fleets_with_other_prefixes_do_not_meet() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        async with sharing(Teller(5), quick(redis.url, prefix="other")) as alone:
            await until(lambda: alone.sharing.state.beats > 4)
            assert not alone.peers
        assert (one.requests, two.requests) == ([2], [1])


async def test_router_that_leaves_takes_its_keys_along_and_one_that_dies_is_forgotten_by_expiry() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, _):
        async with sharing(Teller(3), quick(redis.url)) as third:
            await until(lambda: one.requests == [2, 3])
        assert f"{KEYS}state:{third.sharing.name}" not in await keys(redis)
        await until(lambda: one.requests == [2])
        # As if it had died a moment after its last beat.
        await redis.command("SET", f"{KEYS}state:ghost", b"\x01\x92\x05\x90", "PX", 300)
        await redis.command("SADD", f"{KEYS}routers", "ghost")
        await until(lambda: "ghost" not in one.peers and one.sharing.peers == 2)
        await until(lambda: one.sharing.peers == 1)
        await until(lambda: no_ghost(redis))


async def no_ghost(redis: RedisServer) -> bool:
    return b"ghost" not in await redis.command("SMEMBERS", f"{KEYS}routers")


async def test_restarted_router_is_another_peer() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, _):
        async with sharing(Teller(7), quick(redis.url)) as before:
            await until(lambda: one.requests == [2, 7])
        async with sharing(Teller(8), quick(redis.url)) as after:
            await until(lambda: one.requests == [2, 8])
        assert before.sharing.name != after.sharing.name


async def test_router_that_joins_learns_the_placements_of_before() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):

        async def in_the_stream() -> bool:
            one.to_place = [placed(4, 5)]  # again, for those of a beat that fails are lost
            await a_beat(one)
            return bool(await redis.command("XLEN", f"{KEYS}placed"))

        await until(in_the_stream)
        assert placed(4, 5) in two.placed
        async with sharing(Teller(3), quick(redis.url)) as third:
            await until(lambda: placed(4, 5) in third.placed)


# --- pushes -----------------------------------------------------------------------------------------------------------


async def pushing(*tellers: Teller) -> None:
    await until(lambda: all(t.sharing.state.pushing for t in tellers))


async def test_pushes_arrive_between_beats() -> None:
    async with RedisServer() as redis, pair(quick(redis.url, **PUSHED)) as (one, two):
        await pushing(one, two)
        await a_beat(one)  # for half a second no other will tell of it
        one.place(7, placed(1, 2))
        await until(lambda: two.requests == [7] and placed(1, 2) in two.placed)
        told = [(report.whole, load.requests) for report in two.reports for load in report.loads]
        assert (False, 7) in told
        one.place(8)
        await until(lambda: two.requests == [8])
        assert two.sharing.state.pushes_lost == 0
        assert not one.sharing.state.push_errors


async def test_pushes_may_be_forbidden_and_beats_make_good_for_it(caplog: pytest.LogCaptureFixture) -> None:
    async with RedisServer() as redis:
        await redis.command("ACL", "SETUSER", "default", "-publish")
        async with pair(quick(redis.url, **PUSHED)) as (one, two):
            await until(lambda: one.sharing.state.push_errors[Trouble.AUTH])
            beats = one.sharing.state.beats
            await until(lambda: one.sharing.state.beats >= beats + 8, timeout_s=2.5)  # every 0.1 s, not 0.5 s
            assert one.up
            assert not one.sharing.state.pushing
            await until(lambda: "cannot publish pushes: auth" in caplog.text)
            await redis.command("ACL", "SETUSER", "default", "+publish")
            await pushing(one, two)
    assert caplog.text.count("cannot publish pushes") == 2, "a line each"


async def test_a_subscription_that_is_cut_off_is_made_anew() -> None:
    async with RedisServer() as redis, pair(quick(redis.url, **PUSHED)) as (one, two):
        await pushing(one, two)
        await redis.command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: all(t.sharing.state.push_errors[Trouble.UNREACHABLE] for t in (one, two)))
        one.place(5)
        await until(lambda: two.requests == [5])
        await pushing(one, two)
        assert one.up
        assert not one.errors()


async def test_routers_that_push_nothing_are_met_by_beats() -> None:
    async with (
        RedisServer() as redis,
        sharing(Teller(1), quick(redis.url, push=False, **PUSHED)) as silent,
        sharing(Teller(2), quick(redis.url, **PUSHED)) as other,
    ):
        await until(lambda: silent.requests == [2] and other.requests == [1])
        beats = other.sharing.state.beats
        silent.place(9)
        await until(lambda: other.requests == [9])
        await until(lambda: other.sharing.state.beats >= beats + 8, timeout_s=2.5)
        assert not other.sharing.state.pushing


async def test_garbage_on_the_channel_is_passed_over_and_counted() -> None:
    async with RedisServer() as redis, pair(quick(redis.url, **PUSHED)) as (one, two):
        await pushing(one, two)
        for data in (b"\x02future", b"\x01\xc1", b"", b"x" * 2_000_000):
            await redis.command("PUBLISH", f"{KEYS}push", data)
        await until(lambda: one.sharing.state.ignored["version"] and one.sharing.state.ignored["unreadable"])
        one.place(5, placed(3))
        await until(lambda: two.requests == [5] and placed(3) in two.placed)


# --- faults -----------------------------------------------------------------------------------------------------------


async def down(*tellers: Teller, reason: str) -> None:
    """Each says so, and forgets the others."""
    await until(lambda: all(not t.up and t.errors().get(reason) and not t.requests for t in tellers))


async def well(one: Teller, two: Teller) -> None:
    await until(lambda: one.up and two.up and (one.requests, two.requests) == ([2], [1]))


async def test_killed_and_started_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        await redis.kill()
        await down(one, two, reason="unreachable")
        await until(lambda: one.sharing.state.errors.total() >= 4)
        warned = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == 2, "one line for each router, however long it lasts"
        await redis.start()
        await well(one, two)
    assert sum("well again" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.parametrize("how", ["stopped", "client pause"])
async def test_paused(how: str) -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        if how == "stopped":
            redis.pause()
        else:
            await redis.command("CLIENT", "PAUSE", 1500, "ALL")
        await down(one, two, reason="timeout")
        if how == "stopped":
            redis.resume()
        await well(one, two)
        clients = await redis.command("INFO", "clients")
        assert clients["connected_clients"] <= 3 * 2 + 2, "what was given up is closed"


async def test_flushed_again_and_again() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        one.to_place = [placed(1)]
        await until(lambda: two.placed)
        for _ in range(3):
            await redis.command("FLUSHALL")
            await a_beat(one)
        one.to_place = [placed(2)]
        await until(lambda: placed(2) in two.placed)
        await well(one, two)
        assert one.errors().keys() <= {"timeout"}  # which a busy machine may bring


async def a_beat(teller: Teller) -> None:
    beats = teller.sharing.state.beats
    await until(lambda: teller.sharing.state.beats > beats)


async def test_full() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        await redis.command("CONFIG", "SET", "maxmemory", "1", "maxmemory-policy", "noeviction")
        await down(one, two, reason="full")
        assert one.sharing.state.read_at is not None
        read_at = one.sharing.state.read_at
        await until(lambda: (one.sharing.state.read_at or 0) > read_at)  # what can be done is done
        await redis.command("CONFIG", "SET", "maxmemory", "0")
        await well(one, two)


async def test_read_only() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        await redis.command("REPLICAOF", "127.0.0.1", str(free_port()))
        await down(one, two, reason="read_only")
        await redis.command("REPLICAOF", "NO", "ONE")
        await well(one, two)


async def test_slow_beyond_the_limit_is_a_timeout_and_below_it_nothing() -> None:
    async with (
        RedisServer() as redis,
        Relay(f"127.0.0.1:{redis.port}") as wire,
        pair(quick(f"redis://127.0.0.1:{wire.port}")) as both,
    ):
        one, two = both
        wire.delay_s = 0.1
        beats = one.sharing.state.beats
        await until(lambda: one.sharing.state.beats > beats + 5)
        assert not one.errors()
        assert one.requests == [2]
        wire.delay_s = 1.0
        await down(one, two, reason="timeout")
        wire.delay_s = 0.0
        await well(one, two)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff\xfe*9999999999\r\n", b"*-7\r\n$-9\r\n:x\r\n" * 9, b""],
    ids=["http", "binary", "nearly", "nothing"],
)
async def test_what_is_no_redis(answer: bytes) -> None:
    async with (
        Relay("127.0.0.1:0", answer) as garbage,
        sharing(Teller(1), quick(f"redis://127.0.0.1:{garbage.port}")) as one,
    ):
        await until(lambda: one.sharing.state.errors.total() >= 2)
        assert not one.up
        assert set(one.errors()) <= {"protocol", "unreachable"}


async def test_moved_by_another_address_of_the_same_name() -> None:
    """The name stays, what answers there is another Redis, which knows nothing and whose clock is far behind."""
    port = free_port()
    async with RedisServer(port=port) as first, pair(quick(first.url)) as (one, two):
        await first.command("XADD", f"{KEYS}placed", "99999999999999-0", "r", "ahead", "p", b"")
        one.to_place = [placed(1)]
        await until(lambda: two.placed)
        await first.kill()
        async with RedisServer(port=port):
            await well(one, two)
            one.to_place = [placed(2)]
            await until(lambda: placed(2) in two.placed)


async def test_wrong_password_until_the_file_has_the_right_one(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path_factory.mktemp("secret") / "password"
    secret.write_text("wrong-Sesame\n")
    async with RedisServer() as redis:
        await redis.command("ACL", "SETUSER", "router", "on", ">Sesame-1", "~{extproc}:*", "&{extproc}:*", *ALLOWED)
        await redis.command("ACL", "SETUSER", "default", "off")
        shared = quick(redis.url, username="router", password_file=secret)
        async with sharing(Teller(1), shared) as one, sharing(Teller(2), shared) as two:
            await until(lambda: one.errors().get("auth", 0) >= 2)
            secret.write_text("Sesame-1\n")
            await well(one, two)
            one.to_place = [placed(1)]
            await until(lambda: two.placed)
    assert "Sesame" not in caplog.text


ALLOWED: tuple[str, ...] = ("-@all", "+set", "+get", "+del", "+sadd", "+srem", "+smembers", "+pexpire", "+expire")
ALLOWED += ("+xadd", "+xrange", "+xrevrange", "+publish", "+subscribe", "+client|setname")
"""As in docs/redis.md."""


async def test_garbage_and_other_releases_in_the_store_are_passed_over_and_counted() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        for name, value in {"future": b"\x02whatever", "broken": b"\x01\xff\xff", "empty": b""}.items():
            await redis.command("SET", f"{KEYS}state:{name}", value)
            await redis.command("SADD", f"{KEYS}routers", name)
        await redis.command("XADD", f"{KEYS}placed", "*", "r", "broken", "p", b"\x01\xc1")
        await redis.command("XADD", f"{KEYS}placed", "*", "r", "odd", "q", "no such field")
        await redis.command("SADD", f"{KEYS}routers", b"\xff\xfe odd name")
        await until(lambda: one.sharing.state.ignored["version"] and one.sharing.state.ignored["unreadable"] > 2)
        assert one.requests == [2]
        one.to_place = [placed(1)]
        await until(lambda: two.placed)
        assert not one.errors()


async def test_keys_of_the_wrong_type_are_said_and_harm_nothing_else() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, _):
        await redis.command("SET", f"{KEYS}placed", "no stream", "PX", 600)
        await until(lambda: one.errors().get("refused"))
        assert one.requests == [2]
        await until(lambda: one.up)


async def test_stream_of_placements_is_bounded() -> None:
    async with RedisServer() as redis, pair(quick(redis.url)) as (one, two):
        for _ in range(PLACEMENTS_KEPT + 500):
            await redis.command("XADD", f"{KEYS}placed", "*", "r", one.sharing.name, "p", b"")
        one.to_place = [placed(1)]
        await until(lambda: placed(1) in two.placed, timeout_s=20)
        await until(lambda: short(redis))


async def short(redis: RedisServer) -> bool:
    length: int = await redis.command("XLEN", f"{KEYS}placed")
    return 0 < length <= PLACEMENTS_KEPT + 100


async def test_ends_when_it_is_told_to_whatever_it_does_at_that_moment() -> None:
    """asyncio.wait_for of Python 3.11, used by redis-py where a socket has a timeout, swallows one cancellation in ten of these."""
    async with RedisServer() as redis:
        for moment in range(60):
            async with asyncio.timeout(5):
                async with sharing(Teller(moment), quick(redis.url)):
                    for _ in range(moment % 20):
                        await asyncio.sleep(0)
        await until(lambda: nothing_of_them(redis))


async def nothing_of_them(redis: RedisServer) -> bool:
    return not await redis.command("KEYS", "*state*")
