"""Streams that wait for their turn: a future for each ticket, resolved when the router says so.

The router is asked for turns after anything that may free a place or take one (`poke`), and at the moment it names itself. Nothing polls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from extproc.core.types import Reject, Route, Turn


class Turns(Protocol):
    """What is needed of `extproc.core.router.Router` to hold requests."""

    @property
    def holding(self) -> int:
        """Requests held."""

    def turns(self, now: float) -> list[Turn]:
        """Waits that end now."""

    def release(self, now: float) -> list[Turn]:
        """All waits end now."""

    def next_wakeup(self) -> float | None:
        """When to ask next, if nothing else happens."""


class Holding:
    """Waits for turns. All calls belong to one event loop."""

    def __init__(self, router: Turns, clock: Callable[[], float]) -> None:
        self._router = router
        self._clock = clock
        self._waiting: dict[str, asyncio.Future[Route | Reject]] = {}
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._releasing = False
        self._nobody = asyncio.Event()
        self._nobody.set()

    def __repr__(self) -> str:
        return f"<holding {len(self._waiting)} streams>"

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, ticket: str) -> asyncio.Future[Route | Reject]:
        """The verdict to come. Cancel the future, or `drop` it, when the stream ends before."""
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        self._nobody.clear()
        self.poke()
        return future

    async def empty(self) -> None:
        """Return once nobody waits."""
        await self._nobody.wait()

    def drop(self, ticket: str) -> None:
        """Nobody waits for this one any longer."""
        self._waiting.pop(ticket, None)
        self._count()

    def poke(self) -> None:
        """Something changed: ask the router, once for all that happens in this round of the loop."""
        if self._soon is None and (self._waiting or self._router.holding):
            self._soon = asyncio.get_running_loop().call_soon(self._ask)

    def release(self) -> None:
        """Let all go now, and at once those who come later: their streams had begun before."""
        self._releasing = True
        self._resolve(self._router.release(self._clock()))

    def close(self) -> None:
        """No more turns."""
        for handle in (self._soon, self._later):
            if handle is not None:
                handle.cancel()
        self._soon = self._later = None

    def _ask(self) -> None:
        self._soon = None
        ask = self._router.release if self._releasing else self._router.turns
        self._resolve(ask(self._clock()))
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._waiting and (at := self._router.next_wakeup()) is not None:
            delay_s = max(at - self._clock(), 0.001)
            self._later = asyncio.get_running_loop().call_later(delay_s, self.poke)

    def _resolve(self, turns: list[Turn]) -> None:
        for turn in turns:
            future = self._waiting.pop(turn.ticket, None)
            if future is not None and not future.done():
                future.set_result(turn.verdict)
        self._count()

    def _count(self) -> None:
        if not self._waiting:
            self._nobody.set()
