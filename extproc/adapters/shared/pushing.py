"""What a router says at once: replicas whose load changed, and what it placed, told to all others by a channel.

After a placement the push goes out as soon as the event loop comes to it, but not within `push_interval_s` of the one before nor
while that is still on its way: what happens meanwhile goes with the next. The end of a request waits `ENDS_WITHIN_S` for a
placement to go with. A push that fails is not repeated; the next is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Final, Protocol

from extproc.adapters.shared.board import BoardError, Channel, Trouble
from extproc.adapters.shared.counts import SharingState
from extproc.config import Shared
from extproc.core.observers import Ended, Quiet
from extproc.core.types import Decision

ENDS_WITHIN_S: Final = 0.05
"""At once would make twice as many pushes for nothing. Mean TTFT of eight routers against one, eight seeds of the conversation, agentic
and chat traces in the simulator: 1.004, 1.016, 1.005 so, and 1.013, 1.021, 1.024 where ends wait for a placement or a beat."""
HEARD_PER_S: Final = 400.0
"""So many pushes a second a router hears at most, of all others together; each costs about 0.1 ms, placements included. In the
simulator 50 ms between two pushes of a router instead of 5 add 1 % to mean TTFT."""


class Changes(Quiet):
    """Notes which replicas have another load than was told. Without anybody who wants to know it notes nothing."""

    def __init__(self) -> None:
        self._changed: dict[str, set[str]] = {}
        self._wake: Callable[[bool], None] | None = None

    def __repr__(self) -> str:
        return f"<Changes of {sum(map(len, self._changed.values()))} replicas>"

    def tell(self, wake: Callable[[bool], None] | None) -> None:
        """From now on call this at each change, True for a placement; None for nobody."""
        self._wake = wake
        self._changed.clear()

    def take(self) -> Mapping[str, set[str]]:
        """Pool -> replicas whose load changed since the last call."""
        taken, self._changed = self._changed, {}
        return taken

    def decided(self, decision: Decision) -> None:
        """See Observer."""
        if self._wake is not None and decision.endpoints:
            changed = self._changed.setdefault(decision.pool, set())
            changed.add(decision.endpoints[0])
            if decision.prefiller is not None:
                changed.add(decision.prefiller)
            self._wake(True)

    def ended(self, ended: Ended) -> None:
        """See Observer."""
        if self._wake is not None:
            self._changed.setdefault(ended.flight.pool, set()).add(ended.flight.address)
            self._wake(False)


class Talk(Protocol):
    """What there is to say, and who wants to hear it; `Sharing` is one."""

    @property
    def peers(self) -> int: ...

    def changed(self) -> bytes | None:
        """A push of what changed; None for nothing."""

    def lost(self) -> None:
        """The last push did not arrive: the next is to be whole."""


class Speaker:
    """Pushes what one router has to say, one at a time."""

    def __init__(self, shared: Shared, channel: Channel, talk: Talk, state: SharingState) -> None:
        self._shared, self._channel, self._talk, self._state = shared, channel, talk, state
        self._stirred = asyncio.Event()
        self._later: asyncio.TimerHandle | None = None
        self._whole: bytes | None = None
        self.error: BoardError | None = None
        """Why the last push failed; None when it did not."""

    def __repr__(self) -> str:
        return f"<Speaker {'about to push' if self._stirred.is_set() else 'silent'}>"

    def stir(self, placed: bool) -> None:
        """A load changed, by a placement or by an end."""
        if placed:
            self._stirred.set()
        elif self._later is None and not self._stirred.is_set():
            self._later = asyncio.get_running_loop().call_later(ENDS_WITHIN_S, self._stirred.set)

    def say(self, whole: bytes) -> None:
        """Push this as well, and before anything that changes from now on."""
        self._whole = whole
        self._stirred.set()

    async def run(self) -> None:
        """Push until cancelled."""
        pause_s = self._shared.push_interval_s
        try:
            while True:
                await self._stirred.wait()
                self._calm()
                well = await self._push()
                usual_s = max(self._shared.push_interval_s, self._talk.peers / HEARD_PER_S)
                pause_s = usual_s if well else min(max(2 * pause_s, self._shared.beat_s), self._shared.max_pause_s)
                await asyncio.sleep(pause_s)
        finally:
            self._calm()
            await self._channel.close()

    def _calm(self) -> None:
        self._stirred.clear()
        if self._later is not None:
            self._later.cancel()
            self._later = None

    async def _push(self) -> bool:
        """All that there is to be said. Whether it went well."""
        try:
            if (whole := self._whole) is not None:
                self._whole = None
                await self._publish(whole)
            if self._talk.peers and (changed := self._talk.changed()) is not None:
                await self._publish(changed)
        except BoardError as e:
            self._state.push_errors[e.trouble] += 1
            self.error = e
            self._talk.lost()
            return False
        self.error = None
        return True

    async def _publish(self, data: bytes) -> None:
        await self._channel.publish(data)
        self._state.pushes_sent += 1
        self._state.sent_bytes += len(data)


Hear = Callable[[bytes], Awaitable[None]]


class Listener:
    """Hears what all others push, and begins anew when the connection broke, or is silent although it should not be."""

    def __init__(self, shared: Shared, channel: Channel, hear: Hear, state: SharingState) -> None:
        self._shared, self._channel, self._hear, self._state = shared, channel, hear, state
        self._limit: asyncio.Timeout | None = None
        self.error: BoardError | None = None
        """Why it does not listen; None while it does."""

    def __repr__(self) -> str:
        return f"<Listener {'listens' if self.error is None else self.error.trouble}>"

    def well(self) -> None:
        """All that should be heard is heard: go on."""
        if self._limit is not None:
            self._limit.reschedule(self._patience())

    def _patience(self) -> float:
        return asyncio.get_running_loop().time() + 2 * self._shared.expiry_s

    async def run(self) -> None:
        """Listen until cancelled."""
        pause_s = self._shared.beat_s
        while True:
            heard = self._state.pushes_received
            try:
                await self._listen()
            except TimeoutError:
                self.error = BoardError(Trouble.TIMEOUT, "connected, but not all is heard that is said")
            except BoardError as e:
                self.error = e
            finally:
                self._limit = None
            assert self.error is not None
            self._state.push_errors[self.error.trouble] += 1
            fruitless = self._state.pushes_received == heard
            pause_s = min(2 * pause_s, self._shared.max_pause_s) if fruitless else self._shared.beat_s
            await asyncio.sleep(pause_s)

    async def _listen(self) -> None:
        """Until that fails. Raises BoardError, or TimeoutError when it was not `well` for too long."""
        async with asyncio.timeout_at(self._patience()) as self._limit, aclosing(self._channel.listen()) as pushes:
            async for data in pushes:
                if data:
                    await self._hear(data)
                    await asyncio.sleep(0)  # what waits in the buffer would come without a pause
                else:
                    self.error = None
