"""When to look at a file that others replace: whenever something moves beside it, and now and then without a reason."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Final

from watchfiles import awatch
from watchfiles.main import FileChange

log = logging.getLogger(__name__)

RECHECK_S: Final = 2.0
"""Events do not tell of a swapped directory above, of a link into another directory, nor of NFS; and none comes for a change
between the first look and the start of the watch."""
_DEBOUNCE_MS: Final = 250
"""Longest wait for a writer to finish. The 1.6 s that watchfiles takes by default would delay a removal in a busy directory."""


async def moments(
    path: Path, recheck_s: float = RECHECK_S, nudged: asyncio.Event | None = None
) -> AsyncGenerator[None, None]:
    """When to look at `path`: now, then after each move in its directory, no later than `recheck_s`, and when `nudged` is set."""
    nudged = nudged or asyncio.Event()
    while True:
        nudged.clear()
        yield
        try:
            async with aclosing(_moves(path, recheck_s, nudged)) as moves:
                async for _ in moves:
                    yield
        except (OSError, RuntimeError) as e:  # watchfiles raises either: no such directory, no inotify watch left
            log.debug("%s: not watched: %s; looking every %s s", path, e, recheck_s)
            await asyncio.sleep(recheck_s)


def _moves(path: Path, recheck_s: float, nudged: asyncio.Event) -> AsyncGenerator[set[FileChange], None]:
    """The directory is watched, for a rename onto the file would end a watch of the file."""
    return awatch(
        path.parent,
        watch_filter=None,
        debounce=_DEBOUNCE_MS,
        rust_timeout=max(1, round(recheck_s * 1000)),
        yield_on_timeout=True,
        recursive=False,
        stop_event=nudged,
    )
