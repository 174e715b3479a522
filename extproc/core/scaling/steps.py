"""Changes kept apart: cooldowns, step bounds, and no way down while more was needed a moment ago, or while it is not worth a change.

A replica that is given up may be wanted again: it drains, loses its cache, and is paid for while it starts once more. As nobody
knows for how long it will not be needed, replicas are kept until those that are not needed have cost as much as a change does, and
not for longer: about twice at most what would have been paid had it been known (ski rental, Karlin et al. 1988). On a way up
`Need.at_once` makes the same trade.
"""

from __future__ import annotations

import math
from collections import deque

from extproc.core.scaling.rules import Need
from extproc.core.scaling.settings import ScalingSettings


class Steps:
    """The number of replicas asked for. What is needed comes in as often as it is known; what is asked for changes seldom."""

    __slots__ = ("_down_at", "_idle_s", "_needs", "_taken_at", "_up_at", "asked", "changes", "settings")

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self.asked: int | None = None
        """None before the first look."""
        self.changes = 0
        self._up_at = self._down_at = -math.inf
        self._needs: deque[tuple[float, int]] = deque()
        """(time, replicas needed) of the last `down_cooldown_s`, only those that no later one exceeds: falling."""
        self._taken_at = -math.inf
        self._idle_s = 0.0
        """Replica-seconds of those that were not needed, since all last were or the number last fell."""

    def __repr__(self) -> str:
        return f"<steps {self.asked} asked for, {self.changes} changes>"

    def begin(self, replicas: int, now: float) -> None:
        """So many are there when looks begin. Who has not looked before knows little, and takes nothing away yet."""
        self._set(self._within(replicas))
        self._down_at = self._taken_at = now
        self._idle_s = 0.0

    def take(self, need: Need, now: float) -> int:
        """What to ask for now."""
        assert self.asked is not None, self
        self._set(self._within(self.asked))  # the bounds may be others by now
        up_to, down_to = self._within(need.up_to), self._within(max(need.down_to, need.up_to))
        passed_s, self._taken_at = now - self._taken_at, now
        lately, since, worth = down_to, self._down_at, True
        if need.settled:
            lately, since = self._lately(down_to, now), max(self._up_at, self._down_at)
            worth = self._worth(lately, passed_s)
        if up_to > self.asked and (self.asked == 0 or now - self._up_at >= self.settings.up_cooldown_s):
            self._set(min(max(up_to, self._within(need.at_once)), self.asked + self.settings.max_step_up))
            self._up_at = now
        elif lately < self.asked and worth and now - since >= self.settings.down_cooldown_s:
            self._set(max(lately, self.asked - self.settings.max_step_down))
            self._down_at, self._idle_s = now, 0.0
        return self.asked

    def _worth(self, lately: int, passed_s: float) -> bool:
        """Whether the replicas that were not needed lately have cost as much as a change. An idle pool goes to zero without that."""
        idle = (self.asked or 0) - lately
        self._idle_s = self._idle_s + idle * passed_s if idle > 0 else 0.0
        return lately == 0 or self._idle_s >= self.settings.change_cost_s

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
        self.changes += self.asked is not None and replicas != self.asked
        self.asked = replicas

    def _within(self, replicas: int) -> int:
        return min(max(replicas, self.settings.min_replicas), self.settings.max_replicas)
