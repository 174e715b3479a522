"""GPU use from a DCGM exporter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from aiohttp import web

from extproc.adapters.gpu import follow
from extproc.core.types import GpuUsed
from tests.support.ports import free_port
from tests.support.waiting import until

PAGE = """# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",modelName="NVIDIA H100"} 90
DCGM_FI_DEV_GPU_UTIL{gpu="1",modelName="NVIDIA H100"} 30
DCGM_FI_DEV_GPU_UTIL{gpu="2",modelName="NVIDIA H100"} 9.2e18
DCGM_FI_DEV_FB_USED{gpu="0"} 70000
"""
PARTS = """DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",GPU_I_ID="1"} 0.5
DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",GPU_I_ID="2"} 0.25
"""


async def test_without_a_page_it_is_unknown() -> None:
    told: list[GpuUsed] = []
    await follow("p", None, told.append)
    assert told == [GpuUsed("p", None)]


class Exporter:
    """A page that a test changes."""

    def __init__(self) -> None:
        self.status, self.page = 200, PAGE
        self.url = f"http://127.0.0.1:{free_port()}/metrics"
        self.told: list[GpuUsed] = []

    async def answer(self, _: web.Request) -> web.Response:
        return web.Response(text=self.page, status=self.status)

    async def tells(self, share: float | None) -> None:
        """The next use that is told."""
        self.told.clear()
        await until(lambda: GpuUsed("p", share) in self.told)


@pytest.fixture
async def exporter() -> AsyncIterator[Exporter]:
    made, app = Exporter(), web.Application()
    app.router.add_get("/metrics", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(made.url.split(":")[2].split("/")[0])).start()
    task = asyncio.create_task(follow("p", made.url, made.told.append, interval_s=0.01))
    yield made
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await runner.cleanup()


async def test_the_mean_over_the_gpus_that_tell_theirs_and_over_parts_of_one(exporter: Exporter) -> None:
    await exporter.tells(0.6)
    exporter.page = PARTS
    await exporter.tells(0.375)


@pytest.mark.parametrize(
    ("status", "page", "why"),
    [
        (500, PAGE, "status 500"),
        (200, "<html>", "has no DCGM_FI_DEV_GPU_UTIL; is it a DCGM exporter's page?"),
        (200, 'DCGM_FI_DEV_FB_USED{gpu="0"} 5\n', "none of its GPUs tells its use"),
    ],
)
async def test_a_page_that_does_not_tell_makes_it_unknown_and_is_said_so_once(
    exporter: Exporter, status: int, page: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    await exporter.tells(0.6)
    exporter.status, exporter.page = status, page
    for _ in range(3):
        await exporter.tells(None)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("extproc")]
    assert said == [f"GPU use of pool p is unknown: {exporter.url}: {why}"]
    exporter.status, exporter.page = 200, PAGE
    await exporter.tells(0.6)
