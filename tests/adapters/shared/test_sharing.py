"""The beat, on a board in memory: what is told of whom, and when somebody is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from extproc.adapters.metrics_shared import SharedCollector
from extproc.adapters.shared import wire
from extproc.adapters.shared.board import Board, BoardError, Heard, MemoryBoard, Store, Trouble
from extproc.config import Shared
from extproc.core.types import PeerReported
from tests.adapters.shared.support import Teller, placed, quick, sharing
from tests.support.waiting import until

SHARED = quick("redis://127.0.0.1:1", beat_s=0.1, expiry_s=0.4, max_pause_s=0.2)


def board(store: Store, teller: Teller, shared: Shared = SHARED) -> Board:
    return MemoryBoard(store, teller.sharing.name, shared.expiry_s, lambda: asyncio.get_running_loop().time())


async def test_several_routers_of_one_process_share_without_redis() -> None:
    store, tellers = Store(), [Teller(1), Teller(2), Teller(3)]
    one, two, three = tellers
    async with sharing(one, SHARED, board(store, one)), sharing(two, SHARED, board(store, two)):
        async with sharing(three, SHARED, board(store, three)):
            await until(lambda: [t.requests for t in tellers] == [[2, 3], [1, 3], [1, 2]])
            two.to_place = [placed(1, 2)]
            await until(lambda: one.placed == three.placed == [placed(1, 2)])
        await until(lambda: one.requests == [2])
        assert three.requests == [], "who shares no more goes by local knowledge"


async def test_load_is_told_with_the_age_that_it_has_on_average() -> None:
    store, one, two = Store(), Teller(1), Teller(2)
    async with sharing(one, SHARED, board(store, one)), sharing(two, SHARED, board(store, two)):
        await until(lambda: one.requests)
        fact = one.peers[two.sharing.name][PeerReported]
        assert isinstance(fact, PeerReported)
        assert fact.age_s == SHARED.beat_s / 2


async def test_peer_that_publishes_nothing_new_is_forgotten() -> None:
    """A store that keeps a value beyond its time: a replica cut off from its master, say."""
    store, one = Store(), Teller(1)
    stuck = wire.state(wire.State(5, (wire.PoolState("default", Teller(9).loads, (), ()),)))
    store.states["stuck"] = stuck, float("inf")
    async with sharing(one, SHARED, board(store, one)):
        await until(lambda: one.requests == [9])
        await until(lambda: one.requests == [])


async def test_router_that_leaves_is_forgotten_at_the_next_beat() -> None:
    store, one, two = Store(), Teller(1), Teller(2)
    patient = quick("redis://127.0.0.1:1", expiry_s=5.0)
    async with sharing(one, patient, board(store, one, patient)):
        async with sharing(two, patient, board(store, two, patient)):
            await until(lambda: one.requests == [2])
        await until(lambda: one.requests == [], timeout_s=3)


class Moody:
    """Fails as it is told to."""

    def __init__(self, inner: Board) -> None:
        self.inner = inner
        self.trouble: Trouble | None = None

    async def beat(self, state: bytes, placed: Sequence[bytes]) -> Heard:
        if self.trouble is not None:
            raise BoardError(self.trouble, "so it is")
        return await self.inner.beat(state, placed)

    async def close(self, leave: bool) -> None:
        await self.inner.close(leave)


async def test_trouble_is_said_once_counted_and_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store, one, two = Store(), Teller(1), Teller(2)
    moody = Moody(board(store, one))
    async with sharing(one, SHARED, moody), sharing(two, SHARED, board(store, two)):
        await until(lambda: one.requests == [2])
        one.to_place, moody.trouble = [placed(1)], Trouble.TIMEOUT
        await until(lambda: one.errors().get("timeout", 0) >= 3)
        assert one.requests == two.requests == []
        assert one.sharing.state.placements_left_out == 1
        moody.trouble = None
        await until(lambda: one.requests == [2] and two.requests == [1])
    said = [r.getMessage() for r in caplog.records if "sharing through" not in r.getMessage()]
    assert len(said) == 2
    assert said[0] == "Redis: timeout: so it is; going on by local knowledge"
    assert said[1].startswith("Redis: well again after ")


async def test_metrics_tell_how_it_goes() -> None:
    store, one, two = Store(), Teller(1), Teller(2)
    registry = CollectorRegistry()
    registry.register(SharedCollector(one.sharing, lambda: asyncio.get_running_loop().time()))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"extproc_shared_{name}", labels)

    assert value("up") is None, "nothing where nothing is shared"
    moody = Moody(board(store, one))
    async with sharing(one, SHARED, moody), sharing(two, SHARED, board(store, two)):
        one.to_place = [placed(1)]
        await until(lambda: value("peer_requests") == 2)
        assert value("up") == value("peers") == value("placements_total", what="sent") == 1
        assert value("bytes_total", direction="sent") > 0  # type: ignore[operator]
        assert 0 <= value("read_age_seconds") < 5  # type: ignore[operator]
        moody.trouble = Trouble.FULL
        await until(lambda: value("errors_total", reason="full"))
        assert value("up") == 0
    assert value("up") is None


async def test_name_of_a_process_is_its_own() -> None:
    assert Teller(1).sharing.name != Teller(2).sharing.name
    assert len(Teller(1).sharing.name) == 16
