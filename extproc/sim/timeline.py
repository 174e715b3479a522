"""Virtual time: what happens when, in order, and nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, TypeAlias

Action: TypeAlias = Callable[[Any], object]


class Timeline:
    """Actions to come. Those of one moment run in the order in which they were planned, so the same plan gives the same run."""

    __slots__ = ("_count", "_heap", "now")

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<timeline at {self.now:.3f} s, {len(self._heap)} actions to come>"

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, action: Action, argument: Any = None) -> None:
        """Plan `action(argument)`; what lies in the past happens next. There is no cancelling: actions look whether they still apply."""
        self._count += 1
        heappush(self._heap, (max(when, self.now), self._count, action, argument))

    def step(self) -> None:
        """Let the next action happen. Raises IndexError when there is none."""
        self.now, _, action, argument = heappop(self._heap)
        action(argument)
