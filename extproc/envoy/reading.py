"""Who reads large bodies: a seam, for parsing one takes longer than the event loop may stand still."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from extproc.openai.reading import NotRead, Reading, Task, perform


class Reader(Protocol):
    """Reads large bodies without holding up the loop."""

    async def read(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        """What the body says. Cancelling it frees whatever it holds."""


class AtOnce:
    """Reads in place, and holds the loop up meanwhile: for tests, and tools that have nobody beside them."""

    async def read(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        return perform(task, bytes(body))


@dataclass
class FakeReader:
    """Gives what the test hands to `give`, and remembers what it was asked and how often it was given up."""

    asked: list[tuple[Task, bytes]] = field(default_factory=list)
    cancelled: int = 0

    def __post_init__(self) -> None:
        self._answers: asyncio.Queue[Reading | NotRead] = asyncio.Queue()

    def give(self, answer: Reading | NotRead) -> None:
        """The answer to the one question that is open, or to the next."""
        self._answers.put_nowait(answer)

    async def read(self, task: Task, body: bytes | memoryview) -> Reading | NotRead:
        self.asked.append((task, bytes(body)))
        try:
            return await self._answers.get()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
