"""A source of members that runs, and what it told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from extproc.adapters.discovery import Source
from extproc.core.types import Add, Change, Remove, Replica, Reset
from tests.support.waiting import until


class Watch:
    """What a source told, and the members that follow from it."""

    def __init__(self) -> None:
        self.told: list[Change] = []
        self.mistakes: list[str] = []
        self.members: dict[str, Replica] | None = None

    def emit(self, change: Change) -> None:
        self.told.append(change)
        match change:
            case Reset(replicas=replicas):
                self.members = {r.address: r for r in replicas}
            case Add(replica=replica):
                assert self.members is not None, "a Reset comes first"
                self.members[replica.address] = replica
            case Remove(address=address):
                assert self.members is not None, "a Reset comes first"
                del self.members[address]

    async def tells(self, *expected: Change) -> None:
        """Exactly these changes come, no more and no fewer; forgets them."""
        await until(lambda: len(self.told) >= len(expected), every_s=0.002)
        assert self.told == list(expected)
        self.told.clear()

    async def stays_quiet(self) -> None:
        """Nothing is told in many times the pause after a failure."""
        for _ in range(20):
            await asyncio.sleep(0.002)
        assert self.told == []


Make = Callable[[Watch], Source]


@asynccontextmanager
async def running(make: Make) -> AsyncIterator[Watch]:
    watch = Watch()
    task = asyncio.create_task(make(watch).run(watch.emit))
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
