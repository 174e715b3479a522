"""Extproc is gone for a while: nothing fails, streams run on, and it takes over again by itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.config import Config
from extproc.envoy import bootstrap, endpoints
from tests.e2e.stack import CHAT, chat, client, configured, connected, gathered, replica
from tests.support.envoy import EnvoyProcess
from tests.support.process import Served
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


@dataclass
class Scene:
    """Two replicas and extproc as a process of its own; Envoy is for the test to start."""

    config: Config
    served: Served
    http: aiohttp.ClientSession

    @asynccontextmanager
    async def envoy(self, **changes: Any) -> AsyncIterator[EnvoyProcess]:
        """Envoy with other settings in the section `envoy`, once it has met extproc if that runs."""
        section = self.config.envoy.model_copy(update=changes)
        async with EnvoyProcess(bootstrap.render(self.config.model_copy(update={"envoy": section}))) as process:
            yield process

    async def request(self, i: int) -> int:
        """The status of a short chat."""
        async with self.http.post(f"http://{self.config.envoy.listen}{CHAT}", json=chat(f"{i} " * 20)) as response:
            await response.read()
            return response.status

    async def decisions(self) -> float:
        """That the running process took."""
        return sum((await self.served.metrics("extproc_decisions_total")).values())

    async def decides_all(self) -> None:
        """Extproc decides each request, and ends each."""

        async def ten_of_ten() -> bool:
            before = await self.decisions()
            assert await gathered(10, self.request) == [200] * 10
            return await self.decisions() == before + 10

        await until(ten_of_ten)  # not at once: Envoy's worker threads learn of its health one after the other
        await until(self.empty)

    async def empty(self) -> bool:
        """No flight is open."""
        return (await self.served.metrics("extproc_in_flight ")) == {"extproc_in_flight": 0.0}


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with replica() as a, replica() as b, client() as http:
        config = configured(tmp_path, {"replicas": [a.address, b.address]})
        endpoints.create_if_missing(config)
        async with Served(config) as served:
            yield Scene(config, served, http)
            assert "Traceback" not in served.log()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_fails_while_extproc_is_gone_and_it_takes_over_again(
    scene: Scene, number: signal.Signals
) -> None:
    statuses: list[int] = []
    done = asyncio.Event()

    async def keep_asking() -> None:
        while not done.is_set():
            statuses.append(await scene.request(len(statuses)))

    async def twenty_more() -> None:
        before = len(statuses)
        await until(lambda: len(statuses) >= before + 20)

    async with scene.envoy():
        await scene.decides_all()
        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        body = chat("Tell me all.", stream=True, max_tokens=300, ignore_eos=True)
        async with scene.http.post(f"http://{scene.config.envoy.listen}{CHAT}", json=body) as stream:
            first = await stream.content.readany()
            code = await scene.served.signal(number)
            await twenty_more()
            rest = await stream.read()
        assert code == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        assert (first + rest).endswith(b"data: [DONE]\n\n")
        assert (first + rest).count(b'"content":"') == 301
        await scene.served.start()
        await twenty_more()
        done.set()
        await asyncio.gather(*asking)
        assert set(statuses) == {200}
        await scene.decides_all()


async def test_an_envoy_restarted_without_extproc_serves_the_last_members(scene: Scene) -> None:
    async with scene.envoy():
        await scene.decides_all()
    await scene.served.signal(signal.SIGTERM)
    async with scene.envoy():
        assert await gathered(20, scene.request) == [200] * 20
        await scene.served.start()
        await scene.decides_all()


async def test_a_hung_extproc_costs_no_request(scene: Scene) -> None:
    """A stopped process keeps its sockets open; only the health check and the message timeout tell."""
    async with scene.envoy(message_timeout_s=0.5) as envoy:
        await scene.decides_all()
        scene.served.pause()
        try:
            assert await gathered(10, scene.request) == [200] * 10
            await until(lambda: disconnected(envoy))
            assert await gathered(10, scene.request) == [200] * 10
        finally:
            scene.served.resume()
        await scene.decides_all()


async def disconnected(envoy: EnvoyProcess) -> bool:
    return not await connected(envoy)
