"""Replicas die while extproc still believes in them: the alternate answers, and the next requests avoid the dead one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from extproc.core.health.states import State
from extproc.core.types import End
from tests.e2e.stack import chat, gathered, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


async def test_a_dead_first_choice_is_served_by_the_alternate_and_avoided(tmp_path: Path) -> None:
    """The engine `none` reads no metrics, so nothing but a failed request can tell."""
    async with replica() as a, replica() as b:
        pool = {"engine": "none", "models": ["sim"], "replicas": [a.address, b.address]}
        async with stack(tmp_path, pool) as running:
            prompt = chat("The same for all. " * 200)
            home = await running.served(prompt)
            await running.settled()
            dead, alive = (a, b) if home == a.address else (b, a)
            await dead.stop()
            assert await running.served(prompt) == alive.address
            record = await running.ended()
            assert record.decision.endpoints == (dead.address, alive.address)
            assert record.ended is not None
            assert (record.ended.moved, record.ended.outcome.attempts) == (True, 2)
            assert (record.ended.outcome.end, record.ended.outcome.served) == (End.OK, alive.address)
            assert running.metric("extproc_moved_total", pool="default") == 1
            member = running.app.router.pools["default"].fleet.get(dead.address)
            assert member is not None
            assert member.state(time.monotonic()) in (
                State.SUSPECT,
                State.OPEN,
            )  # the check that it brings on may be in already
            assert await running.served(prompt) == alive.address
            record = await running.ended()
            assert record.decision.endpoints == (alive.address,)
            assert record.ended is not None
            assert record.ended.outcome.attempts == 1


async def test_a_killed_replica_loses_no_new_request_and_returns(tmp_path: Path) -> None:
    async with replica() as a, replica() as b, replica() as c:
        pool = {"policy": "round_robin", "replicas": [r.address for r in (a, b, c)]}
        async with stack(tmp_path, pool) as running:
            await b.stop()
            served = await gathered(30, lambda i: running.served(chat(f"{i} " * 50)))
            assert set(served) == {a.address, c.address}
            member = running.app.router.pools["default"].fleet.get(b.address)
            assert member is not None
            await until(lambda: member.health.unreachable(time.monotonic()))
            # Envoy is told too: by its own choice it would not go there, were extproc gone.
            await until(lambda: unhealthy(running.config.envoy.endpoints_file, b.port))
            async with replica(port=b.port):
                await until(lambda: member.state(time.monotonic()) is State.SLOW_STARTING)
                served = await gathered(12, lambda i: running.served(chat(f"{i} " * 50)))
                assert set(served) == {a.address, b.address, c.address}


def unhealthy(path: Path, port: int) -> bool:
    return any(str(port) in line and "UNHEALTHY" in line for line in path.read_text().splitlines())


async def test_when_every_replica_is_down_the_client_gets_503_and_nothing_stays_open(tmp_path: Path) -> None:
    async with replica() as a, replica() as b, stack(tmp_path, {"replicas": [a.address, b.address]}) as running:
        await a.stop()
        await b.stop()
        for _ in range(3):
            async with running.post() as response:
                assert response.status == 503
        record = await running.ended()
        assert record.ended is not None
        assert record.ended.outcome.end is End.UNREACHABLE


@pytest.mark.parametrize("stream", [True, False])
async def test_a_hung_engine_is_avoided_though_its_page_says_that_it_is_idle(tmp_path: Path, stream: bool) -> None:
    """Silence tells: of a stream at once, of a whole response when it is overdue where nothing else moves."""
    async with replica() as a, replica() as b, stack(tmp_path, {"replicas": [a.address, b.address]}) as running:

        def ask(i: int) -> asyncio.Task[str]:
            return asyncio.create_task(running.served(chat(f"{i} " * 50, stream=stream, max_tokens=4)))

        hung = a if await ask(-1) == a.address else b
        hung.hang = True
        stuck: list[asyncio.Task[str]] = []
        for i in range(40):
            _, pending = await asyncio.wait([ask(i)], timeout=0.5)
            stuck += pending
            if stuck:
                break
        assert stuck, "none of 40 was sent to the replica that served the first"
        load = next(m.load for _, m in running.app.router.members() if m.address == hung.address)
        await until(lambda: load.backlog_s(time.monotonic()) > 0.2)
        after = await asyncio.gather(*(ask(100 + i) for i in range(8)))
        assert hung.address not in after
        hung.hang = False
        await asyncio.gather(*stuck)


async def test_a_full_replica_hands_on_to_the_next(tmp_path: Path) -> None:
    """503 at once is how an engine says that its queue is full: the request is tried elsewhere, not failed."""
    async with replica(max_in_flight=1, time_scale=4) as a, replica() as b:
        pool = {
            "policy": "session_affinity",
            "policy_options": {"load_factor": 100.0},
            "replicas": [a.address, b.address],
        }
        async with stack(tmp_path, pool) as running:
            session = await session_of(a.address, running.served)
            headers = {"x-session-id": session}
            served = await asyncio.gather(*(running.served(chat(max_tokens=30), headers=headers) for _ in range(6)))
            assert sorted(set(served)) == sorted([a.address, b.address])
            assert served.count(a.address) < 6
            await running.settled()
            assert running.metric("extproc_moved_total", pool="default") == served.count(b.address)


async def session_of(address: str, served: object) -> str:
    """A session whose home is that replica."""
    for i in range(64):
        if await served(chat(), headers={"x-session-id": f"s{i}"}) == address:  # type: ignore[operator]
            return f"s{i}"
    raise AssertionError(f"no session in 64 goes to {address}")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_replica_that_shuts_down_costs_no_request(tmp_path: Path, stream: bool) -> None:
    """vLLM 0.32 then answers 500 to what is new, and 200 to every check."""
    async with replica() as a, replica() as b, stack(tmp_path, {"replicas": [a.address, b.address]}) as running:
        prompt = chat("The same for all. " * 200, stream=stream)
        home = await running.served(prompt)
        await running.settled()
        going, staying = (a, b) if home == a.address else (b, a)
        going.fail_with = 500
        served = await gathered(10, lambda i: running.served(chat(f"{i} The same for all. " * 200, stream=stream)))
        assert set(served) == {staying.address}
        assert await running.served(prompt) == staying.address
