"""The channel by Redis: PUBLISH and SUBSCRIBE on one name; see docs/redis.md.

    {PREFIX}:1:push    messages of routers to all others (wire.py)

In a Cluster it is the plain kind, not the sharded one: that is older, any node will do, and what is published at one of them
reaches those who listen at another. Nothing is queued here: what is not read yet stays with Redis, which drops who falls too
far behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from extproc.adapters.shared.redis_client import connect_for_channels, disconnect
from extproc.adapters.shared.redis_errors import translated
from extproc.config import Shared

SCHEMA: Final = 1
"""Of the messages' channel, as of the keys."""
CLOSE_S: Final = 0.5
"""For closing a connection."""
MESSAGE: Final = b"message"


class RedisChannel:
    """One router's access: a connection to publish on and another to listen on. Each is given up after any failure."""

    def __init__(self, shared: Shared, router: str) -> None:
        """`router` is the name of this process; nothing is connected before the first use."""
        self._shared, self._router = shared, router
        self._name = f"{{{shared.prefix}}}:{SCHEMA}:push"
        self._publisher: Redis | None = None
        self._publishing = self._listening = 0
        """Failures of each of the two; in a Cluster each leads to another node."""

    def __repr__(self) -> str:
        return f"<RedisChannel {self._name} of {self._router}>"

    async def publish(self, data: bytes) -> None:
        """See Channel."""
        try:
            async with asyncio.timeout(self._shared.timeout_s):
                if self._publisher is None:
                    self._publisher = connect_for_channels(self._shared, self._router, self._publishing)
                await self._publisher.publish(self._name, data)
        except Exception as e:
            self._publishing += 1
            await self.close()
            raise translated(e) from None

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """See Channel."""
        client = connect_for_channels(self._shared, self._router, self._listening)
        subscription = client.pubsub()
        try:
            await self._subscribe(subscription)
            yield b""
            while True:
                yield await self._next(subscription)
        finally:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await subscription.aclose()  # type: ignore[no-untyped-call]
                    await disconnect(client)

    async def close(self) -> None:
        """See Channel. A listener closes its own connection when it ends."""
        client, self._publisher = self._publisher, None
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await disconnect(client)

    async def _subscribe(self, subscription: PubSub) -> None:
        try:
            async with asyncio.timeout(self._shared.timeout_s):
                await subscription.subscribe(self._name)
                await subscription.parse_response(block=True)  # that it is so, or why not
        except Exception as e:
            self._listening += 1
            raise translated(e) from None

    async def _next(self, subscription: PubSub) -> bytes:
        try:
            while True:
                # Not get_message: that costs as much again for each.
                kind, _, data = await subscription.parse_response(block=True)
                if kind == MESSAGE and isinstance(data, bytes) and data:
                    return data
        except Exception as e:
            self._listening += 1
            raise translated(e) from None
