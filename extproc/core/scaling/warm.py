"""Spare replicas, started and ready: those that are no longer needed stay for a while, and some are always there.

A spare takes requests like any other. To keep it out would save nothing, and it would have an empty cache when it is needed.
"""

from __future__ import annotations

from enum import StrEnum

from extproc.core.record import record


@record
class WarmSettings:
    """Defaults are those of the configuration (`pools[].scaling.warm`)."""

    min_replicas: int = 2
    """Spares that are always there, beside what is needed."""
    max_replicas: int = 5
    """At most so many stay when they are no longer needed."""
    ttl_s: float = 3600.0
    """And for no longer than this."""


class Role(StrEnum):
    """What a replica is to its pool; also a metric label."""

    WARM = "warm"  # there, and not needed at present
    ACTIVATING = "activating"  # asked for, not there yet
    ACTIVE = "active"  # needed, and there
    DRAINING = "draining"  # given up, with requests still running


class WarmPool:
    """How many replicas there should be beside those that are needed."""

    __slots__ = ("_since", "settings")

    def __init__(self, settings: WarmSettings) -> None:
        self.settings = settings
        self._since: list[float] = []
        """When each of the spares that stay became one, oldest first; those that are always there not among them."""

    def __repr__(self) -> str:
        return f"<warm pool, {len(self._since)} stay beside {self.settings.min_replicas}>"

    def take(self, before: int, needed: int, now: float) -> int:
        """Spares from now on. So many replicas were needed until now, spares aside, and so many are."""
        settings = self.settings
        self._since = [at for at in self._since if now - at < settings.ttl_s]
        if needed > before:
            del self._since[max(len(self._since) - (needed - before), 0) :]  # the youngest are needed again
        self._since += [now] * max(before - needed, 0)
        room = max(settings.max_replicas - settings.min_replicas, 0)
        del self._since[room:]
        return settings.min_replicas + len(self._since)


def roles(asked: int, needed: int, present: int, draining: int) -> dict[Role, int]:
    """How many replicas of each role there are."""
    return {
        Role.WARM: max(min(present, asked) - needed, 0),
        Role.ACTIVATING: max(asked - present, 0),
        Role.ACTIVE: min(present, needed),
        Role.DRAINING: draining,
    }
