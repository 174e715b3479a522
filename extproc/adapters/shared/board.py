"""Where routers leave what they tell, and find what the others told: the seam, and an implementation in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

PLACEMENTS_KEPT: Final = 2_000
"""Batches of placements, of all routers together. With 8 routers those of two minutes; a router that joins begins with them."""
BATCHES_READ: Final = 256
"""At one beat: with one batch a router and beat, enough for as many routers as may be."""
WAITING: Final = 1_000
"""Messages that a channel in memory keeps for each who listens."""
MAX_PEERS: Final = 256
"""Routers that are read; of more, any so many."""


class Trouble(StrEnum):
    """Why the store could not be used, or not wholly; also a metric label."""

    TIMEOUT = "timeout"  # no answer in time
    UNREACHABLE = "unreachable"  # no connection, or it broke; no Sentinel knows the server; the Cluster is down
    TLS = "tls"
    AUTH = "auth"  # user or password wrong, or a command not allowed to this user
    FULL = "full"  # writes are refused for want of memory
    READ_ONLY = "read_only"  # a replica, not the master
    LOADING = "loading"  # it reads its data from disk
    PROTOCOL = "protocol"  # what answers is no Redis
    REFUSED = "refused"  # any other error that it answers


class BoardError(Exception):
    """The store could not be used; the text is one line, without secrets."""

    def __init__(self, trouble: Trouble, text: str) -> None:
        super().__init__(text)
        self.trouble = trouble


@dataclass(frozen=True, slots=True)
class Heard:
    """What one beat brought."""

    states: Mapping[str, bytes]
    """Of each router that is there now, except the one that asks: what it last published."""
    placed: Sequence[tuple[str, bytes]]
    """Router and batch of placements, of others since the last beat, oldest first; after the first beat also older ones."""
    behind: bool = False
    """Whether there may be more batches than these, which the next beat brings."""
    refused: BoardError | None = None
    """What was published may not have arrived, though the rest could be read."""


class Board(Protocol):
    """One router's access to the store. Used by one task; needs nothing before the first beat."""

    async def beat(self, state: bytes, placed: Sequence[bytes]) -> Heard:
        """Publish what the router is now, to be forgotten unless renewed in time, and batches of placements; read all others'.

        One round trip. Raises BoardError.
        """

    async def close(self, leave: bool) -> None:
        """Let go of connections; with `leave` first remove what this router published. Raises nothing."""


class Channel(Protocol):
    """One router's access to what all of them say at once. What is lost on the way is lost: the beats make good for it.

    `publish` and `listen` may be used by two tasks at the same time; needs nothing before.
    """

    async def publish(self, data: bytes) -> None:
        """Say it to all who listen, to this router as well. Raises BoardError, after which the next call tries anew."""

    def listen(self) -> AsyncGenerator[bytes, None]:
        """What is said from now on; the first item is empty, and means that it begins. Ends by BoardError only."""

    async def close(self) -> None:
        """Let go of connections. Raises nothing."""


@dataclass(slots=True)
class Store:
    """What several routers of one process share."""

    states: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    """Router -> what it published, and when that is forgotten."""
    placed: deque[tuple[int, str, bytes]] = field(default_factory=lambda: deque(maxlen=PLACEMENTS_KEPT))
    count: int = 0
    listeners: list[asyncio.Queue[bytes]] = field(default_factory=list)


class MemoryBoard:
    """A board within one process: for tests and simulations, and what the one by Redis is held to."""

    def __init__(self, store: Store, router: str, expiry_s: float, clock: Callable[[], float]) -> None:
        self._store, self._router, self._expiry_s, self._clock = store, router, expiry_s, clock
        self._read = 0

    def __repr__(self) -> str:
        return f"<MemoryBoard of {self._router}: {len(self._store.states)} routers>"

    async def beat(self, state: bytes, placed: Sequence[bytes]) -> Heard:
        store, now = self._store, self._clock()
        store.states[self._router] = state, now + self._expiry_s
        for router in [r for r, (_, until) in store.states.items() if now >= until]:
            del store.states[router]
        for batch in placed:
            store.count += 1
            store.placed.append((store.count, self._router, batch))
        batches = [(router, b) for i, router, b in store.placed if i > self._read and router != self._router]
        self._read = store.count
        return Heard({r: s for r, (s, _) in store.states.items() if r != self._router}, batches)

    async def close(self, leave: bool) -> None:
        if leave:
            self._store.states.pop(self._router, None)


class MemoryChannel:
    """A channel within one process: for tests. Who falls behind by `WAITING` messages loses some."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<MemoryChannel: {len(self._store.listeners)} listen>"

    async def publish(self, data: bytes) -> None:
        for listener in self._store.listeners:
            if not listener.full():
                listener.put_nowait(data)

    async def listen(self) -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[bytes] = asyncio.Queue(WAITING)
        self._store.listeners.append(queue)
        try:
            yield b""
            while True:
                yield await queue.get()
        finally:
            self._store.listeners.remove(queue)

    async def close(self) -> None:
        pass
