"""The board by Redis. Three kinds of keys, all in one slot of a Cluster, all with an expiry; see docs/redis.md.

    {PREFIX}:1:routers         set of the names of routers
    {PREFIX}:1:state:ROUTER    what the router last published (wire.py)
    {PREFIX}:1:placed          stream of batches of placements: fields r (router) and p (wire.py)

One beat is one pipeline of plain commands, without scripts or transactions: in a Redis that is full or read only those that
read still answer. It reads the states of the routers that were in the set at the last beat, so that a router is heard of one
beat after it joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from extproc.adapters.shared.board import BATCHES_READ, MAX_PEERS, PLACEMENTS_KEPT, Heard
from extproc.adapters.shared.redis_client import Client, connect, disconnect
from extproc.adapters.shared.redis_errors import translated
from extproc.config import Shared

SCHEMA: Final = 1
"""Of the keys. Routers of another schema are not seen, and do no harm."""
PLACED_EXPIRY_S: Final = 60
"""Of the stream, after the last router that wrote to it."""
CLOSE_S: Final = 0.5
"""For a goodbye."""
FROM_THE_START: Final = b"-"
JOINED: Final = 1
"""Place of the answer that says whether the set of routers has grown by this one."""


class RedisBoard:
    """One router's access to a Redis. After any failure the connection is given up, and the next beat makes a new one:
    with the password of then, to the master of then, at the address that the name has then.
    """

    def __init__(self, shared: Shared, router: str) -> None:
        """`router` is the name of this process; nothing is connected before the first beat."""
        self._shared, self._router = shared, router
        space = f"{{{shared.prefix}}}:{SCHEMA}"
        self._roster, self._placed, self._state = f"{space}:routers", f"{space}:placed", f"{space}:state:"
        self._client: Client | None = None
        self._known: list[str] = []
        """Routers in the set at the last beat, without this one."""
        self._missing: set[str] = set()
        """Those of them that had no state."""
        self._last = FROM_THE_START
        """Id of the last entry read of the stream."""
        self._fresh = True
        """Whether this may be another Redis than at the last beat."""

    def __repr__(self) -> str:
        return f"<RedisBoard of {self._router}: {'connected' if self._client else 'not connected'}>"

    async def beat(self, state: bytes, placed: Sequence[bytes]) -> Heard:
        """See Board."""
        try:
            async with asyncio.timeout(self._shared.timeout_s):
                return await self._beat(state, placed)
        except Exception as e:
            await self.close(leave=False)
            raise translated(e) from None

    async def close(self, leave: bool) -> None:
        """See Board."""
        client, self._client, self._fresh = self._client, None, True
        if client is None:
            return
        with suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await disconnect(client)
        if leave:
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_S):
                    await self._leave()

    async def _beat(self, state: bytes, placed: Sequence[bytes]) -> Heard:
        if self._client is None:
            self._client = connect(self._shared, self._router)
        answers = await self._pipeline(self._client, state, placed)
        refused = next((translated(a) for a in answers if isinstance(a, Exception)), None)
        count = len(self._known)
        roster, entries, *rest = answers[-2 - count - self._fresh :]
        behind = isinstance(entries, list) and len(entries) >= BATCHES_READ
        heard = Heard(self._states(rest[:count]), self._entries(entries), behind, refused)
        self._follow(roster)
        self._check_last(rest[count:])
        # Where the set did not have this router, it is another Redis, or was emptied, though no connection may have failed.
        self._fresh = answers[JOINED] == 1
        return heard

    async def _pipeline(self, client: Client, state: bytes, placed: Sequence[bytes]) -> list[Any]:
        """Write, then read: the names, further entries of the stream, the states, and the newest entry where it may be another Redis."""
        expiry_ms = round(self._shared.expiry_s * 1e3)
        pipe = client.pipeline(transaction=False)
        pipe.set(self._state + self._router, state, px=expiry_ms)
        pipe.sadd(self._roster, self._router)
        pipe.pexpire(self._roster, 10 * expiry_ms)
        if self._missing:
            pipe.srem(self._roster, *self._missing)
        for batch in placed:
            pipe.xadd(self._placed, {"r": self._router, "p": batch}, maxlen=PLACEMENTS_KEPT, approximate=True)
        if placed:
            pipe.expire(self._placed, PLACED_EXPIRY_S)
        pipe.smembers(self._roster)
        after = self._last if self._last == FROM_THE_START else b"(" + self._last
        # Not XREAD: a Cluster's client would ask the server first where its key stands.
        pipe.xrange(self._placed, min=after, count=BATCHES_READ)
        for router in self._known:
            pipe.get(self._state + router)
        if self._fresh:
            pipe.xrevrange(self._placed, count=1)
        found: list[Any] = await pipe.execute(raise_on_error=False)
        return found

    def _states(self, found: Sequence[Any]) -> dict[str, bytes]:
        named = zip(self._known, found, strict=True)
        states = {router: value for router, value in named if isinstance(value, bytes)}
        # One whose key is gone for two beats is dead: whoever notices takes it from the set.
        self._missing = {r for r, value in zip(self._known, found, strict=True) if value is None}
        return states

    def _entries(self, found: Any) -> list[tuple[str, bytes]]:
        if not isinstance(found, list):
            return []
        if found:
            self._last = found[-1][0]
        mine = self._router.encode()
        return [
            (fields.get(b"r", b"").decode("ascii", "replace"), fields[b"p"])
            for _, fields in found
            if fields and fields.get(b"r") != mine and b"p" in fields
        ]

    def _follow(self, roster: Any) -> None:
        if isinstance(roster, set):
            names = sorted(name.decode("ascii", "replace") for name in roster)
            self._known = [name for name in names if name != self._router and name.isalnum()][:MAX_PEERS]

    def _check_last(self, newest: Sequence[Any]) -> None:
        """In another Redis, or one that was restarted, the clock may be behind: then its entries would look old for ever."""
        if self._last == FROM_THE_START or not newest or not isinstance(newest[0], list):
            return
        [found] = newest
        if not found or _id(found[0][0]) < _id(self._last):
            self._last = FROM_THE_START

    async def _leave(self) -> None:
        client = connect(self._shared, self._router)  # on the old one an answer may be on its way
        pipe = client.pipeline(transaction=False)
        pipe.delete(self._state + self._router)
        pipe.srem(self._roster, self._router)
        try:
            await pipe.execute(raise_on_error=False)
        finally:
            await disconnect(client)


def _id(entry: bytes) -> tuple[int, int]:
    """Of a stream's entry: milliseconds, and a number among those of the same."""
    at, _, count = entry.partition(b"-")
    return int(at), int(count)
