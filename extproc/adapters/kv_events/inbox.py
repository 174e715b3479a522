"""Engines that connect to us: one socket for all of them, told apart by their topics."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

from extproc.adapters.kv_events.sockets import CONNECTED, Connected, Subscriber

TURN: Final = 64
"""Messages handed on before the event loop has its turn."""


class Inbox:
    """What one replica's publisher sent. Begins with the news of a connection, so that a replay is asked for."""

    def __init__(self, most: int, closed: Callable[[], object]) -> None:
        """Beyond `most` waiting messages further ones are dropped, which shows as a gap."""
        self._closed = closed
        self._waiting: deque[list[bytes] | Connected] = deque([CONNECTED])
        self._most = most
        self._there = asyncio.Event()

    def put(self, frames: list[bytes]) -> None:
        """Keep a message, where there is room."""
        if len(self._waiting) < self._most:
            self._waiting.append(frames)
            self._there.set()

    async def next(self) -> list[bytes] | Connected:
        """As `Incoming.next`."""
        while not self._waiting:
            self._there.clear()
            await self._there.wait()
        return self._waiting.popleft()

    def close(self) -> None:
        """Nobody takes any more."""
        self._closed()


class Sorter:
    """Hands the messages of a bound socket to the inboxes of the replicas that their topics name."""

    def __init__(self, inboxes: Mapping[str, Inbox]) -> None:
        """`inboxes`: by address; may change meanwhile."""
        self._inboxes = inboxes
        self.strangers = 0
        """Messages whose topic names no replica of the pool."""

    async def run(self, subscriber: Subscriber) -> None:
        """Sort until cancelled."""
        handed = 0
        while True:
            frames = await subscriber.next()
            if not isinstance(frames, Connected):
                self._sort(frames)
            handed += 1
            if handed % TURN == 0:
                await asyncio.sleep(0)

    def _sort(self, frames: list[bytes]) -> None:
        inbox = self._of(named(frames[0]) if frames else "")
        if inbox is None:
            self.strangers += 1
        else:
            inbox.put(frames)

    def _of(self, name: str) -> Inbox | None:
        """A name without a port counts where a single replica has that IP address."""
        if name in self._inboxes or not name:
            return self._inboxes.get(name)
        found = [inbox for address, inbox in self._inboxes.items() if address.rpartition(":")[0] == name]
        return found[0] if len(found) == 1 else None


def named(topic: bytes) -> str:
    """The replica that a topic names: `ip:port` of `kv@ip:port@model`, in any case what is between its first two `@`."""
    parts = topic.decode(errors="replace").split("@")
    return parts[1] if len(parts) > 1 else ""
