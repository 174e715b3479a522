"""One router's share of what comes to its pool: others route to the same replicas, and what they route shows there."""

from __future__ import annotations

import math
from typing import Final

AVERAGED_S: Final = 120.0
"""Over about so many seconds requests in flight are averaged: at one moment their proportion is mostly chance."""
LEAST_OURS: Final = 0.5
"""Requests in flight that this router is taken to have at least: of fewer no proportion can be known."""


class Share:
    """Requests in flight, ours and others'. By Little's law they are in proportion to what comes, where all take about as long."""

    __slots__ = ("_at", "_others", "_ours")

    def __init__(self) -> None:
        self._ours = self._others = 0.0
        self._at: float | None = None

    def __repr__(self) -> str:
        return f"<share: {self._ours:.1f} in flight, {self._others:.1f} of others>"

    def take(self, ours: float, others: float, now: float) -> float:
        """By how much more comes to the pool than to this router, as a factor of at least 1. `ours`, `others`: in flight now."""
        gain = 1.0 if self._at is None else 1.0 - math.exp(-(now - self._at) / AVERAGED_S)
        self._at = now
        self._ours += gain * (ours - self._ours)
        self._others += gain * (others - self._others)
        return 1.0 + self._others / max(self._ours, LEAST_OURS)
