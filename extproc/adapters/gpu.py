"""How much a pool's GPUs are used, from a DCGM exporter's page. An optional input: where it is missing the use is unknown, not zero."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from extproc.core.types import GpuUsed

SERIES: Final = "DCGM_FI_DEV_GPU_UTIL"
"""Per cent of the time with a kernel running, one series for each GPU."""
INTERVAL_S: Final = 15.0
TIMEOUT_S: Final = 5.0
MAX_BYTES: Final = 8 << 20


async def follow(pool: str, url: str | None, learn: Callable[[GpuUsed], None]) -> None:
    """Tell the use again and again until cancelled; that it is unknown, once, where there is no URL."""
    if url is None:
        learn(GpuUsed(pool, None))
        return
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        while True:
            learn(GpuUsed(pool, await _read(session, url)))
            await asyncio.sleep(INTERVAL_S)


async def _read(session: aiohttp.ClientSession, url: str) -> float | None:
    """None for a page that does not come, is too large, or has none of the series."""
    try:
        async with session.get(url) as response:
            if response.status != 200:
                return None
            page = bytearray()
            async for part in response.content.iter_any():
                page += part
                if len(page) > MAX_BYTES:
                    return None
            return used(page.decode(errors="replace"))
    except (aiohttp.ClientError, TimeoutError):
        return None


def used(page: str) -> float | None:
    """Mean share over the GPUs of a page; None where it has none, or cannot be read."""
    try:
        families = [f for f in text_string_to_metric_families(page) if f.name == SERIES]
    except ValueError:
        return None
    values = [s.value for f in families for s in f.samples if 0.0 <= s.value <= 100.0]
    return sum(values) / len(values) / 100.0 if values else None
