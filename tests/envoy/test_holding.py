"""Streams that wait: each gets its turn once, whoever asks when."""

from __future__ import annotations

import asyncio

import pytest

from extproc.core.types import Refusal, Reject, Turn, Wait
from extproc.envoy.holding import Holding
from extproc.envoy.intake import FakeRouter
from tests.envoy.setup import route
from tests.support.waiting import until

WAIT = Wait("t", deadline=30.0)


class Bench:
    def __init__(self) -> None:
        self.router = FakeRouter([WAIT], held=1)
        self.now = 0.0
        self.holding = Holding(self.router, lambda: self.now)


async def test_a_turn_ends_the_wait_of_its_ticket_alone() -> None:
    bench = Bench()
    one, other = bench.holding.wait("1"), bench.holding.wait("2")
    bench.router.due.append(Turn("2", route(1)))
    bench.holding.poke()
    assert (await other) == route(1)
    assert not one.done()
    assert repr(bench.holding) == "<holding 1 streams>"


async def test_a_turn_for_nobody_harms_nobody() -> None:
    bench = Bench()
    gone = bench.holding.wait("1")
    bench.holding.drop("1")
    bench.router.due.append(Turn("1", route(1)))
    bench.holding.poke()
    await until(lambda: not bench.router.due)
    assert not gone.done()


async def test_a_future_that_was_cancelled_is_left_alone() -> None:
    bench = Bench()
    bench.holding.wait("1").cancel()
    bench.router.due.append(Turn("1", route(1)))
    bench.holding.poke()
    await until(lambda: not bench.router.due)


async def test_many_pokes_of_one_round_ask_once() -> None:
    bench = Bench()
    asked = []

    def turns(now: float) -> list[Turn]:
        asked.append(now)
        return []

    bench.router.turns = turns  # type: ignore[method-assign]
    bench.holding.wait("1")
    for _ in range(10):
        bench.holding.poke()
    await asyncio.sleep(0)
    assert asked == [0.0]


async def test_empty_returns_when_the_last_one_is_gone() -> None:
    bench = Bench()
    async with asyncio.timeout(5):
        await bench.holding.empty()
    bench.holding.wait("1")
    bench.holding.wait("2")
    waiting = asyncio.ensure_future(bench.holding.empty())
    bench.holding.drop("1")
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.router.due.append(Turn("2", Reject(Refusal.DEADLINE)))
    bench.holding.poke()
    async with asyncio.timeout(5):
        await waiting


@pytest.mark.parametrize("turn", [route(1), Reject(Refusal.STOPPING)])
async def test_after_the_release_nobody_waits_any_more(turn: object) -> None:
    """A stream that had begun before brings its request only now."""
    bench = Bench()
    released: list[float] = []

    def release(now: float) -> list[Turn]:
        released.append(now)
        return bench.router.turns(now)

    bench.router.release = release  # type: ignore[method-assign]
    bench.holding.release()
    late = bench.holding.wait("late")
    bench.router.due.append(Turn("late", turn))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        assert await late == turn
    assert len(released) == 2


async def test_the_router_is_asked_again_at_its_time_and_not_after_the_end() -> None:
    bench = Bench()
    bench.router.wakeup = 0.05
    future = bench.holding.wait("1")
    bench.router.due.append(Turn("2", route(1)))
    await until(lambda: not bench.router.due)
    bench.router.due.append(Turn("1", route(1)))
    async with asyncio.timeout(5):
        await future
    bench.holding.wait("3")
    bench.holding.close()
    bench.router.due.append(Turn("3", route(1)))
    await asyncio.sleep(0.1)
    assert len(bench.router.due) == 1
