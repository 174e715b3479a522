"""Extproc is gone for a while: nothing fails, streams run on, and it takes over again by itself."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.apart import Scene, apart
from tests.e2e.stack import CHAT, chat, connected, gathered
from tests.support.envoy import EnvoyProcess
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with apart(tmp_path) as running:
        yield running


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
