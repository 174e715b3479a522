"""A replica's health under watch: every transition is kept, and must follow from the one before."""

from __future__ import annotations

from typing import Any

from extproc.core.health.replica import Health
from extproc.core.health.settings import HealthSettings
from extproc.core.health.states import Reason, State

S = HealthSettings()
Transitions = list[tuple[State, Reason]]


class Watched:
    """Keeps what is told."""

    def __init__(self, settings: HealthSettings = S, *, scraped: bool = False, **options: Any) -> None:
        self.last = State.GONE
        self.told: Transitions = []
        given: dict[str, Any] = {"slow_from": 1e9, **options}
        self.health = Health(settings, 0.0, scraped=scraped, report=self._hear, **given)

    def _hear(self, before: State, after: State, reason: Reason) -> None:
        assert before is self.last, "a transition begins where the last one ended"
        assert after is not before, "a state that stays is no transition"
        self.last = after
        self.told.append((after, reason))

    def news(self) -> Transitions:
        """What was told since the last call."""
        told, self.told = self.told, []
        return told
