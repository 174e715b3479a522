"""Recurring work that must not end: what dies is counted, said, and started again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
"""Between a failure and the next start: doubled each time, so that one that fails at once does not fill the log."""

Work = Callable[[], Awaitable[None]]


class Tasks:
    """Named tasks of one event loop. Work that returns is done; work that raises begins again after a pause."""

    def __init__(self, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self.failures: Counter[str] = Counter()
        """By name of the task; a name is there from its start on."""
        self._first_pause_s = first_pause_s
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Tasks {', '.join(self._tasks) or 'none'}>"

    def start(self, name: str, work: Work) -> None:
        """Run `work` under this name, in the place of what ran under it before."""
        self.failures[name] += 0
        before = self._tasks.pop(name, None)
        if before is not None:
            before.cancel()
        self._tasks[name] = asyncio.create_task(self._keep(name, work, before), name=name)

    async def stop(self) -> None:
        """Cancel all and wait for their end."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _keep(self, name: str, work: Work, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        pause_s = self._first_pause_s
        while True:
            began = _now()
            try:
                return await work()
            except Exception as e:
                self.failures[name] += 1
                if _now() - began > 2 * LONGEST_PAUSE_S:
                    pause_s = self._first_pause_s  # it had been well
                log.exception("%s ended by %r; again in %g s", name, e, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _now() -> float:
    return asyncio.get_running_loop().time()
