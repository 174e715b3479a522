"""Notices that this process stood still: stopped, starved of CPU, or blocked. What it missed then is no evidence against others.

After such a time every timer is late at once, while the answers that would have beaten them still wait in the sockets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

BEAT_S: Final = 0.1
STALL_S: Final = 0.5
"""Lateness from which it is said and made up for. Shorter than any timeout by which a replica is judged."""
SETTLE_S: Final = 1.0
"""Until what waited in the sockets has been read, and connections that the proxy gave up are there again."""


class Pulse:
    """A timer that knows when it should have come."""

    def __init__(self, clock: Callable[[], float], stalled: Callable[[float], None]) -> None:
        """`stalled` gets the seconds for which nothing ran, before anything that was due meanwhile is done."""
        self.stalls = 0
        self.stalled_s = 0.0
        self._clock = clock
        self._stalled = stalled
        self._due: float | None = None
        self._settled_at = clock()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Pulse {self.stalls} stalls, {self.stalled_s:.1f} s>"

    def start(self) -> None:
        """Beat from now on, in the running loop."""
        self._due = self._clock() + BEAT_S
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    def stop(self) -> None:
        """No more."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = None

    def settling(self, now: float) -> bool:
        """Whether a timer that fires now may do so because of us alone."""
        return now < self._settled_at or (self._due is not None and now - self._due > STALL_S)

    def beat(self) -> None:
        """The timer fired."""
        now = self._clock()
        late_s = 0.0 if self._due is None else now - self._due
        if late_s > STALL_S:
            self.stalls += 1
            self.stalled_s += late_s
            self._settled_at = now + SETTLE_S
            log.warning("stood still for %.1f s; silence in that time is held against nobody", late_s)
            self._stalled(late_s)
        self.start()
