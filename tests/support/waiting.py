"""Waiting for a condition, never for luck."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def until(check: Callable[[], object], *, timeout_s: float = 5.0, every_s: float = 0.02) -> Any:
    """The first true value that `check` (plain or async) gives; AssertionError with the last value after `timeout_s`."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    while True:
        found = check()
        value = await found if inspect.isawaitable(found) else found
        if value:
            return value
        if clock() >= deadline:
            raise AssertionError(f"not so after {timeout_s} s; last seen: {value!r}")
        await asyncio.sleep(every_s)
