"""Changes kept apart: cooldowns, step bounds, and no way down while more was needed a moment ago."""

from __future__ import annotations

import math
from collections import deque

from extproc.core.scaling.rules import Need
from extproc.core.scaling.settings import ScalingSettings


class Steps:
    """The number of replicas asked for. What is needed comes in as often as it is known; what is asked for changes seldom."""

    __slots__ = ("_down_at", "_needs", "_up_at", "asked", "changes", "settings")

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self.asked: int | None = None
        """None before the first look."""
        self.changes = 0
        self._up_at = self._down_at = -math.inf
        self._needs: deque[tuple[float, int]] = deque()
        """(time, replicas needed) of the last `down_cooldown_s`, only those that no later one exceeds: falling."""

    def __repr__(self) -> str:
        return f"<steps {self.asked} asked for, {self.changes} changes>"

    def begin(self, replicas: int, now: float) -> None:
        """So many are there when the first look is taken. A process that just started knows little, and takes nothing away yet."""
        self.asked, self._down_at = self._within(replicas), now

    def take(self, need: Need, now: float) -> int:
        """What to ask for now."""
        assert self.asked is not None, self
        self._set(self._within(self.asked))  # the bounds may be others by now
        up_to, down_to = self._within(need.up_to), self._within(max(need.down_to, need.up_to))
        lately, since = down_to, self._down_at
        if need.settled:
            lately, since = self._lately(down_to, now), max(self._up_at, self._down_at)
        if up_to > self.asked and (self.asked == 0 or now - self._up_at >= self.settings.up_cooldown_s):
            self._set(min(up_to, self.asked + self.settings.max_step_up))
            self._up_at = now
        elif lately < self.asked and now - since >= self.settings.down_cooldown_s:
            self._set(max(lately, self.asked - self.settings.max_step_down))
            self._down_at = now
        return self.asked

    def _lately(self, down_to: int, now: float) -> int:
        """The most that was needed within the cooldown of a way down."""
        needs = self._needs
        while needs and needs[-1][1] <= down_to:
            needs.pop()
        needs.append((now, down_to))
        while needs[0][0] < now - self.settings.down_cooldown_s:
            needs.popleft()
        return needs[0][1]

    def _set(self, replicas: int) -> None:
        self.changes += replicas != self.asked
        self.asked = replicas

    def _within(self, replicas: int) -> int:
        return min(max(replicas, self.settings.min_replicas), self.settings.max_replicas)
