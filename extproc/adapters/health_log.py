"""A log line for each replica that goes out of service or comes back, for whoever is called at night."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from extproc.core.health.states import State
from extproc.core.observers import HealthChanged, Quiet

log = logging.getLogger(__name__)

LINES: Final = 50
"""Most in `WINDOW_S`: where a whole fleet flaps the first tell the story, and the metrics have the count."""
WINDOW_S: Final = 10.0
_OUT: Final = frozenset({State.OPEN, State.DRAINING, State.GONE})


class HealthLog(Quiet):
    """Observer. What is passed over for a moment, or on trial, is not worth a line: `extproc_health_changes_total` has it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._out: dict[tuple[str, str], State] = {}
        """Pool and address of members that are out, and how."""
        self._until = 0.0
        self._said = 0

    def health_changed(self, change: HealthChanged) -> None:
        key = change.pool, change.address
        before = self._out.pop(key, None)
        if change.after in _OUT:
            if change.after is not State.GONE:
                self._out[key] = change.after
            if before is not change.after:
                self._say("replica %s of pool %s is out: %s (%s)", change)
        elif change.after in (State.READY, State.SLOW_STARTING):
            if before is not None:
                self._say("replica %s of pool %s is back: %s (%s)", change)
        elif before is not None:
            self._out[key] = before  # on trial, or in doubt again: not back yet

    def _say(self, text: str, change: HealthChanged) -> None:
        now = self._clock()
        if now >= self._until:
            self._until, self._said = now + WINDOW_S, 0
        self._said += 1
        if self._said <= LINES:
            log.info(text, change.address, change.pool, change.after.value, change.reason.value)
        elif self._said == LINES + 1:
            log.warning("many replicas change their state; no further lines on that for %g s", WINDOW_S)
