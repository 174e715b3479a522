"""How fast a queue drains, measured, and what follows from it: when to come again, and whether a wait can be in time."""

from __future__ import annotations

import math
from typing import Final

_RATE_S: Final = 10.0
"""Work is averaged over about so many seconds in which there was a queue: a few turns of short answers. Less would swing with each
long prompt, more would tell of a fleet that has changed."""
_LEAST_S: Final = 0.5
"""Of observation; less says nothing, for the first places may have been free already."""
RETRY_AFTER_S: Final = (1.0, 60.0)
"""Nobody is told to come sooner or later: at once would double the load, and in a minute the world is another."""


class Drain:
    """Tokens sent off per second while requests wait. Without a queue the clock stands still: an idle fleet is not a slow one."""

    __slots__ = ("_at", "_observed_s", "_since", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._observed_s = 0.0
        """Seconds with a queue that the tokens stand for, faded like them."""
        self._since: float | None = None
        self._at = 0.0

    def __repr__(self) -> str:
        return f"<drain {self._tokens:.0f} tokens in {self._observed_s:.1f} s>"

    def start(self, now: float) -> None:
        """There is a queue from now on."""
        if self._since is None:
            self._since = self._at = now

    def stop(self, now: float) -> None:
        """The queue is empty."""
        self._advance(now)
        self._since = None

    def sent(self, tokens: float, now: float) -> None:
        """Work left the queue for a replica."""
        self._advance(now)
        self._tokens += tokens

    def rate(self, now: float) -> float | None:
        """Tokens per second; None while too little was seen."""
        self._advance(now)
        if self._observed_s < _LEAST_S or not self._tokens:
            return None
        return self._tokens / self._observed_s

    def wait_s(self, tokens: float, now: float) -> float | None:
        """Seconds until so much work has been sent off; None when nothing tells."""
        rate = self.rate(now)
        return None if rate is None else tokens / rate

    def retry_after_s(self, tokens: float, now: float) -> float | None:
        """When to come again, with so much work waiting here; None when nothing tells."""
        wait_s = self.wait_s(tokens, now)
        return None if wait_s is None else min(max(wait_s, RETRY_AFTER_S[0]), RETRY_AFTER_S[1])

    def _advance(self, now: float) -> None:
        if self._since is None or now <= self._at:
            return
        passed_s = now - self._at
        fade = math.exp(-passed_s / _RATE_S)
        self._tokens *= fade
        self._observed_s = self._observed_s * fade + _RATE_S * (1.0 - fade)
        self._at = now
