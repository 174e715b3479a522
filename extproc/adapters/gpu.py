"""How much a pool's GPUs are used, from one page of a DCGM exporter. An optional input: where it is missing the use is unknown, not zero."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from extproc.adapters.gpu_sources import DcgmPages, GpuError
from extproc.core.types import GpuUsed

log = logging.getLogger(__name__)

INTERVAL_S: Final = 15.0
TIMEOUT_S: Final = 5.0


async def follow(
    pool: str, url: str | None, learn: Callable[[GpuUsed], None], *, interval_s: float = INTERVAL_S
) -> None:
    """Tell the use again and again until cancelled; that it is unknown, once, where there is no URL."""
    if url is None:
        learn(GpuUsed(pool, None))
        return
    pages, said = DcgmPages(url, TIMEOUT_S), ""
    try:
        while True:
            use, why = await _use(pages, url)
            learn(GpuUsed(pool, use))
            if why and why != said:
                log.warning("GPU use of pool %s is unknown: %s", pool, why)
            said = why
            await asyncio.sleep(interval_s)
    finally:
        await pages.close()


async def _use(pages: DcgmPages, url: str) -> tuple[float | None, str]:
    """Mean over the GPUs of the page that tell theirs; or None, and why."""
    try:
        gpus = await pages.read(url)
    except GpuError as e:
        return None, str(e)
    known = [gpu.use for gpu in gpus if gpu.use is not None]
    return (sum(known) / len(known), "") if known else (None, f"{url}: none of its GPUs tells its use")
