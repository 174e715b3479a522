"""Replicas taken out of service under load: what runs there ends well, nothing new goes there, and they come back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.stack import Json, Stack, chat, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

POOL: Json = {"policy": "round_robin", "health": {"slow_start_s": 0}}
"""Each in turn, and its full share at once, so that a few requests show who is in."""


def told(running: Stack, address: str) -> str:
    """What Envoy is told of a member's health."""
    port = address.rpartition(":")[2]
    lines = running.config.envoy.endpoints_file.read_text().splitlines()
    (line,) = (line for line in lines if port in line)
    return next(health for health in ("UNHEALTHY", "DRAINING", "HEALTHY") if health in line)


async def shown(running: Stack, address: str) -> Json:
    async with running.client.get(f"{running.admin}/debug/replicas") as response:
        (view,) = (view for view in await response.json() if view["replica"] == address)
    found: Json = view
    return found


async def asked(running: Stack, path: str, address: str) -> Json:
    async with running.client.post(f"{running.admin}{path}", params={"replica": address}) as response:
        assert response.status == 200, await response.text()
        (view,) = await response.json()
    found: Json = view
    return found


class Load:
    """Short requests, a few at a time; `served` has who answered each, by the order in which they were sent."""

    def __init__(self, running: Stack) -> None:
        self._running = running
        self._sent = 0
        self.served: dict[int, str] = {}

    async def go_on(self, lane: int) -> None:
        for i in range(100_000):
            number, self._sent = self._sent, self._sent + 1
            self.served[number] = await self._running.served(chat(f"{lane} {i} " * 30))

    async def more(self, count: int = 20) -> set[str]:
        """Who answers the next so many; those that were on their way when asked are not looked at, however late."""
        begin = self._sent

        def since() -> list[str]:
            return [who for number, who in self.served.items() if number >= begin]

        await until(lambda: len(since()) >= count, timeout_s=30)
        return set(since())


LANES = 3


@asynccontextmanager
async def load(running: Stack) -> AsyncIterator[Load]:
    """Steady for the length of the block; a request that fails fails the test."""
    made = Load(running)
    lanes = [asyncio.create_task(made.go_on(lane)) for lane in range(LANES)]
    try:
        yield made
        failed = [lane.exception() for lane in lanes if lane.done()]
        assert failed == []
    finally:
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)


async def test_a_replica_drained_by_call_finishes_its_stream_and_returns_when_that_ends(tmp_path: Path) -> None:
    async with (
        replica() as a,
        replica() as b,
        stack(tmp_path, {**POOL, "replicas": [a.address, b.address]}) as running,
        load(running) as requests,
    ):
        assert await requests.more() == {a.address, b.address}
        body = chat("Tell me all. ", stream=True, max_tokens=400, ignore_eos=True)
        async with running.post(body) as response:
            first = await response.content.readany()
            home = response.headers["x-extproc-replica"]
            (other,) = {a.address, b.address} - {home}
            view = await asked(running, "/replicas/drain", home)
            assert (view["state"], view["reason"]) == ("draining", "asked")
            assert view["in_flight"] >= 1
            await until(lambda: told(running, home) == "DRAINING")
            assert told(running, other) == "HEALTHY"
            assert await requests.more() == {other}
            assert (await shown(running, home))["in_flight"] == 1, "only the stream runs there, and it still does"
            rest = await response.read()
        assert (first + rest).endswith(b"data: [DONE]\n\n")
        assert (first + rest).count(b'"content":"') == 401
        await until(lambda: in_flight(running, home) == 0)
        assert await requests.more() == {other}
        assert (await asked(running, "/replicas/undrain", home))["state"] == "ready"
        await until(lambda: told(running, home) == "HEALTHY")
        assert await requests.more() == {a.address, b.address}


def in_flight(running: Stack, address: str) -> int:
    return next(len(member.load) for _, member in running.app.router.members() if member.address == address)


async def test_a_replica_drained_in_its_file_gets_nothing_new_until_the_file_says_so(tmp_path: Path) -> None:
    def listed(*entries: object) -> None:
        new = tmp_path / "members.new"
        new.write_text(json.dumps(entries))
        new.replace(tmp_path / "members.json")

    async with replica() as a, replica() as b:
        listed(a.address, b.address)
        async with (
            stack(tmp_path, {**POOL, "discovery": {"file": {"path": "members.json"}}}) as running,
            load(running) as requests,
        ):
            assert await requests.more() == {a.address, b.address}
            listed(a.address, {"address": b.address, "drain": True})
            await until(lambda: told(running, b.address) == "DRAINING")
            assert await requests.more() == {a.address}
            listed(a.address, b.address)
            await until(lambda: told(running, b.address) == "HEALTHY")
            assert await requests.more() == {a.address, b.address}
