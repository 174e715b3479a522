"""Requests that extproc keeps, with the rendered bootstrap: how long Envoy waits for them, and what becomes of them when extproc does not live so long."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.config import Config
from extproc.envoy import bootstrap, endpoints, names
from tests.envoy import steering
from tests.envoy.setup import prompt
from tests.support.backend import Backend
from tests.support.delays import Delays, server
from tests.support.envoy import EnvoyProcess
from tests.support.waiting import until

pytestmark = pytest.mark.envoy

MODES = ["BUFFERED", "FULL_DUPLEX_STREAMED"]


def rendered(config: Config, mode: str = "BUFFERED") -> dict[str, Any]:
    endpoints.create_if_missing(config)
    whole = bootstrap.render(config)
    ours = steering.http_filters(whole)[0]["typed_config"]
    ours["processing_mode"] |= {"request_body_mode": mode}
    if mode != "BUFFERED":
        ours["processing_mode"] |= {"request_trailer_mode": "SEND"}
    return whole


async def healthy(envoy: EnvoyProcess) -> bool:
    name = f"cluster.{names.SERVICE_CLUSTER}.membership_healthy"
    return (await envoy.stats(name))[name] == 1


def posted(config: Config, client: aiohttp.ClientSession) -> asyncio.Task[int]:
    async def status() -> int:
        async with client.post(f"http://{config.envoy.listen}/v1/chat/completions", data=prompt(5)) as response:
            await response.read()
            return response.status

    return asyncio.create_task(status())


@asynccontextmanager
async def holding(directory: Path, hold_s: float, mode: str) -> AsyncIterator[tuple[Config, Delays, Backend]]:
    """Envoy, extproc in this process, and a replica."""
    async with Backend() as a:
        config = steering.config(directory, a.address, progress_interval_s=None)
        router = Delays(hold_s, (a.address,))
        serving = server(config, router)
        await serving.start()
        try:
            async with EnvoyProcess(rendered(config, mode)) as envoy:
                await until(lambda: healthy(envoy))
                yield config, router, a
        finally:
            await serving.stop(0)


@pytest.mark.parametrize("mode", MODES)
async def test_a_request_held_for_longer_than_the_message_timeout_is_answered(tmp_path: Path, mode: str) -> None:
    async with holding(tmp_path, 2.0, mode) as (config, router, a), aiohttp.ClientSession() as client:
        assert config.envoy.message_timeout_s < 1.0
        assert await posted(config, client) == 200
        assert (router.left, len(a.received)) == ([], 1)


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_that_leaves_frees_its_place_at_once(tmp_path: Path, mode: str) -> None:
    async with holding(tmp_path, 30.0, mode) as (config, router, a), aiohttp.ClientSession() as client:
        request = posted(config, client)
        await until(lambda: router.waited == 1)
        request.cancel()
        await until(lambda: router.left == ["t1"])
        assert (router.held, a.received) == (0, [])


@asynccontextmanager
async def apart(directory: Path) -> AsyncIterator[tuple[Config, asyncio.subprocess.Process, Backend]]:
    """The same with extproc as a process of its own, which holds requests for longer than any test."""
    async with Backend() as a:
        config = steering.config(directory, a.address, progress_interval_s=None)
        command = (sys.executable, "-m", "tests.support.delays", config.listen.grpc, "300", a.address)
        process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])
        try:
            async with EnvoyProcess(rendered(config)) as envoy:
                await until(lambda: healthy(envoy), timeout_s=20)
                yield config, process, a
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_requests_held_by_a_process_that_dies_or_stops_pass_unrouted(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with apart(tmp_path) as (config, process, a), aiohttp.ClientSession() as client:
        requests = [posted(config, client) for _ in range(10)]
        done, pending = await asyncio.wait(requests, timeout=1.0)  # twice the message timeout: they are held
        assert (len(done), len(pending), a.received) == (0, 10, [])
        process.send_signal(number)
        assert await asyncio.wait_for(asyncio.gather(*requests), 10) == [200] * 10
        assert len(a.received) == 10
