"""GPU use from a DCGM exporter."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from aiohttp import web

from extproc.adapters.gpu import follow, used
from extproc.core.types import GpuUsed
from tests.support.ports import free_port
from tests.support.waiting import until

PAGE = """# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",modelName="NVIDIA H100"} 90
DCGM_FI_DEV_GPU_UTIL{gpu="1",modelName="NVIDIA H100"} 30
DCGM_FI_DEV_FB_USED{gpu="0"} 70000
"""


@pytest.mark.parametrize(
    ("page", "share"),
    [
        (PAGE, 0.6),
        ("", None),
        ("DCGM_FI_DEV_FB_USED 5\n", None),
        ("<html>", None),
        ('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 9.2e18\n', None),
    ],
)
def test_the_mean_over_the_gpus_of_a_page(page: str, share: float | None) -> None:
    assert used(page) == share


async def test_without_a_page_it_is_unknown() -> None:
    told: list[GpuUsed] = []
    await follow("p", None, told.append)
    assert told == [GpuUsed("p", None)]


async def serve(port: int, status: int) -> web.AppRunner:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=PAGE, status=status)

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


@pytest.mark.parametrize(("status", "share"), [(200, 0.6), (500, None), (None, None)])
async def test_a_page_is_read_and_one_that_does_not_come_says_nothing(status: int | None, share: float | None) -> None:
    port, told = free_port(), list[GpuUsed]()
    runner = await serve(port, status) if status else None
    task = asyncio.create_task(follow("p", f"http://127.0.0.1:{port}/metrics", told.append))
    await until(lambda: told)
    assert told == [GpuUsed("p", share)]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    if runner is not None:
        await runner.cleanup()
