"""Pushes, on a channel in memory: what is said when, and what becomes of what is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from extproc.adapters.shared import wire
from extproc.adapters.shared.board import BoardError, Heard, MemoryBoard, MemoryChannel, Store, Trouble
from extproc.adapters.shared.counts import SharingState
from extproc.adapters.shared.others import Others
from extproc.adapters.shared.pushing import Changes, Listener, Speaker
from extproc.config import Shared
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, Fact, Outcome, PeerLoad, PeerReported, Placed, Replica, Reset, Route
from tests.adapters.shared.support import POOL, REPLICA, Teller, decision, placed, quick, sharing
from tests.core.support import request
from tests.support.waiting import until

SLOW = quick("redis://127.0.0.1:1", beat_s=0.5, beat_without_push_s=0.1, expiry_s=1.5)


class Moody(MemoryChannel):
    """Loses what is said, says that it did, or lets nobody hear, as it is told to."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.refuses = self.swallows = self.mutes = False
        self.said: list[wire.Push] = []
        self.listened = 0

    async def publish(self, data: bytes) -> None:
        if self.refuses:
            raise BoardError(Trouble.AUTH, "not you")
        self.said.append(wire.read_push(data))
        if not self.swallows:
            await super().publish(data)

    async def listen(self) -> AsyncGenerator[bytes, None]:
        self.listened += 1
        async for data in super().listen():
            if not self.mutes or not data:
                yield data


def now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def pair(shared: Shared = SLOW) -> AsyncIterator[tuple[Teller, Moody, Teller]]:
    """Two routers, the channel of the first, and pushes that reach both."""
    store, one, two = Store(), Teller(1), Teller(2)
    ways = [Moody(store), MemoryChannel(store)]
    boards = [MemoryBoard(store, t.sharing.name, shared.expiry_s, now) for t in (one, two)]
    async with sharing(one, shared, boards[0], ways[0]), sharing(two, shared, boards[1], ways[1]):
        await until(lambda: one.sharing.state.pushing and two.sharing.state.pushing)
        yield one, ways[0], two  # type: ignore[misc]


async def a_beat(teller: Teller) -> None:
    beats = teller.sharing.state.beats
    await until(lambda: teller.sharing.state.beats > beats)


def between_beats(way: Moody) -> list[wire.Push]:
    return [push for push in way.said if not push.whole]


async def test_only_what_changed_is_said_and_the_end_of_a_request_waits_for_a_placement() -> None:
    async with pair() as (one, way, two):
        await a_beat(one)  # the next is far off
        one.place(4, placed(1))
        await until(lambda: two.requests == [4])
        [push] = between_beats(way)
        assert [(pool, [load.requests for load in loads]) for pool, loads in push.loads] == [(POOL, [4])]
        assert wire.read_batch(push.batch) == [placed(1)]
        assert two.placed == [placed(1)]


async def test_what_happens_at_once_goes_in_one_push() -> None:
    async with pair() as (one, way, two):
        await a_beat(one)
        for i in range(50):
            one.place(i, placed(i + 1))
        await until(lambda: two.requests == [49] and len(two.placed) == 50)
        assert len(between_beats(way)) <= 2


async def test_a_push_that_was_lost_is_healed_by_the_next_beat_with_its_placements() -> None:
    async with pair() as (one, way, two):
        await a_beat(one)
        way.swallows = True
        one.place(6, placed(1, 2))
        await until(lambda: between_beats(way))
        way.swallows = False
        assert placed(1, 2) not in two.placed
        await until(lambda: two.requests == [6] and placed(1, 2) in two.placed)
        assert two.sharing.state.pushes_lost >= 1


async def test_after_one_that_failed_the_next_is_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with pair() as (one, way, two):
        way.refuses = True
        one.place(6)
        await until(lambda: one.sharing.state.push_errors[Trouble.AUTH] >= 2)
        await until(lambda: two.requests == [6])  # by beats
        await until(lambda: "cannot publish pushes: auth: not you; going on by beats every 0.1 s" in caplog.text)
        said = len(way.said)
        way.refuses = False
        await until(lambda: len(way.said) > said)
        assert way.said[said].whole
        await until(lambda: one.sharing.state.pushing and "pushes reach all routers again" in caplog.text)
        assert one.up
    assert caplog.text.count("cannot publish") == 1


async def test_who_hears_nothing_says_so_and_all_beat_sooner_until_it_does() -> None:
    async with pair() as (one, way, two):
        way.mutes = True
        await until(lambda: not two.sharing.state.pushing, timeout_s=3)
        beats = two.sharing.state.beats
        await until(lambda: two.sharing.state.beats >= beats + 8, timeout_s=2)  # every 0.1 s, not 0.5 s
        await until(lambda: way.listened >= 2, timeout_s=6)  # it listens anew, though nothing broke
        assert one.sharing.state.push_errors[Trouble.TIMEOUT]
        way.mutes = False
        await until(lambda: one.sharing.state.pushing and two.sharing.state.pushing)


async def test_without_a_channel_beats_come_as_often_as_before() -> None:
    store, one = Store(), Teller(1)
    async with sharing(one, SLOW, MemoryBoard(store, one.sharing.name, 1.5, now)):
        await until(lambda: one.sharing.state.beats >= 8, timeout_s=2)
        assert not one.sharing.state.pushing


async def test_nothing_is_noted_while_nobody_wants_to_know() -> None:
    changes = Changes()
    woken: list[bool] = []
    changes.decided(decision())
    assert not changes.take()
    changes.tell(woken.append)
    changes.decided(decision())
    assert woken == [True]
    assert changes.take() == {POOL: {REPLICA}}
    changes.decided(decision())
    changes.tell(None)
    assert not changes.take()


async def test_placements_and_ends_of_a_router_are_noted() -> None:
    changes = Changes()
    woken: list[bool] = []
    made = Router([PoolSettings(POOL)], Random(0), changes)
    made.learn(Reset(POOL, (Replica(REPLICA),)), 0.0)
    changes.tell(woken.append)
    verdict = made.arrive(request("Hello"), 0.0)
    assert isinstance(verdict, Route)
    assert changes.take() == {POOL: {REPLICA}}
    made.finish(verdict.flight, Outcome(End.OK), 1.0)
    assert changes.take() == {POOL: {REPLICA}}
    assert woken == [True, False]


class Chatter:
    """Always has something to say, to one other router."""

    peers = 1
    failures = 0

    def changed(self) -> bytes | None:
        return wire.push(wire.Push("me", 1, False, ()))

    def lost(self) -> None:
        self.failures += 1


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_end_alone_is_said_after_a_short_wait() -> None:
    way = Moody(Store())
    speaker = Speaker(SLOW, way, Chatter(), SharingState())
    async with running(speaker.run()):
        speaker.stir(placed=False)
        speaker.stir(placed=False)
        assert way.said == []
        await until(lambda: way.said)
        assert len(way.said) == 1


async def test_what_fails_is_tried_ever_less_often_and_nothing_piles_up() -> None:
    way, talk, state = Moody(Store()), Chatter(), SharingState()
    way.refuses = True
    speaker = Speaker(quick("redis://127.0.0.1:1", beat_s=0.02, max_pause_s=0.1), way, talk, state)
    async with running(speaker.run()):
        for _ in range(50):
            speaker.stir(placed=True)
            await asyncio.sleep(0.01)
        assert 2 <= talk.failures == state.push_errors[Trouble.AUTH] <= 15
        assert speaker.error is not None
        way.refuses = False
        speaker.stir(placed=True)
        await until(lambda: way.said and speaker.error is None)


async def test_the_push_after_a_lost_one_names_all_replicas() -> None:
    one = Teller(3)
    one.to_place = [placed(1)]
    first = wire.read_push(one.sharing.changed() or b"")
    one.sharing.lost()
    one.to_place = [placed(1)]
    second = wire.read_push(one.sharing.changed() or b"")
    assert (first.whole, first.loads) == (False, ())
    assert (second.number, second.whole, second.loads) == (first.number + 1, True, ((POOL, one.loads),))
    assert one.sharing.changed() is None


async def test_who_never_hears_anything_listens_anew_and_who_hears_all_does_not() -> None:
    soon = quick("redis://127.0.0.1:1", expiry_s=0.35, timeout_s=0.2)
    async with pair(soon) as (one, way, _):
        beats = one.sharing.state.beats
        await until(lambda: one.sharing.state.beats > beats + 12)
        assert way.listened == 1
    way.mutes = True

    async def hear(_: bytes) -> None: ...

    async with running(Listener(soon, way, hear, SharingState()).run()):
        await until(lambda: way.listened >= 3)


# --- what arrives -----------------------------------------------------------------------------------------------------


def hearing(name: str = "me") -> tuple[Others, list[Fact], SharingState]:
    facts: list[Fact] = []
    state = SharingState()
    return Others(name, facts.append, lambda: 10.0, state), facts, state


def push(router: str, number: int, *placed_: Placed, **more: Any) -> bytes:
    batch = wire.batch(placed_)[0] if placed_ else b""
    loads = ((POOL, (PeerLoad(REPLICA, number, 0.0, 0.0),)),)
    return wire.push(wire.Push(router, number, more.get("whole", False), loads, batch))


async def known(others: Others, name: str, number: int) -> None:
    state = wire.state(wire.State(number, (wire.PoolState(POOL, (), (), ()),), says=True, hears=True))
    await others.take(Heard({name: state}, []), 0.0, 1.0)


async def test_pushes_of_who_is_not_known_by_its_state_or_is_ourselves_are_passed_over() -> None:
    others, facts, state = hearing()
    await others.pushed(push("stranger", 1, placed(1)))
    await others.pushed(push("me", 3))
    assert facts == []
    assert others.echoed == 3
    await known(others, "stranger", 1)
    facts.clear()
    await others.pushed(push("stranger", 2, placed(1)))
    assert facts == [PeerReported(POOL, "stranger", (PeerLoad(REPLICA, 2, 0.0, 0.0),), 0.0, 2, False), placed(1)]
    assert (state.pushes_received, state.pushes_lost) == (2, 0)


async def test_gaps_are_counted_and_silence_is_noticed_at_the_beat_after_the_next() -> None:
    others, _, state = hearing()

    def heard() -> bool:
        return others.all_heard

    await known(others, "a", 1)
    await others.pushed(push("a", 2))
    await others.pushed(push("a", 5))
    assert state.pushes_lost == 2
    await known(others, "a", 6)
    assert heard()
    await known(others, "a", 7)
    assert not heard(), "by now 6 should have come"
    await others.pushed(push("a", 6))
    assert heard()


async def test_batches_of_beats_are_passed_over_unless_a_push_may_be_missing() -> None:
    state, facts, clock = SharingState(), list[Fact](), [0.0]
    others = Others("me", facts.append, lambda: clock[0], state)
    batch = wire.batch([placed(1)])[0]

    async def learns(number: int, *, behind: bool = False) -> bool:
        said = wire.state(wire.State(number, (), says=True, hears=True))
        await others.take(Heard({"a": said}, [("a", batch)], behind), 0.0, 2.0)
        learned = placed(1) in facts
        facts.clear()
        return learned

    assert await learns(1), "it was not there when that was pushed"
    clock[0] = 5.0
    assert not await learns(2)
    assert await learns(3, behind=True)
    clock[0] = 6.0
    assert await learns(4), "the last of what it is behind with"
    clock[0] = 8.0
    assert not await learns(5)
    await others.pushed(push("a", 6))
    await others.pushed(push("a", 8))
    assert await learns(8)
