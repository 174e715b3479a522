"""Who wants to know what the router does: metrics, the recorder of decisions, tests. One record each, handed to all."""

from __future__ import annotations

from typing import Protocol

from extproc.core.flights import Flight
from extproc.core.record import record
from extproc.core.types import Decision, Outcome, Reject


@record
class Ended:
    """A flight that ended, with what was predicted and what came: one record for metrics, logs and learning."""

    flight: Flight
    outcome: Outcome
    moved: bool
    """Served by another replica than the first of the list."""
    output_tokens: int | None
    """Reported, or estimated from the size of the response; None when there is nothing to go by."""


class Observer(Protocol):
    """Whoever wants to know: metrics, the recorder of decisions, tests."""

    def decided(self, decision: Decision) -> None: ...

    def refused(self, reject: Reject, pool: str | None) -> None: ...

    def ended(self, ended: Ended) -> None: ...

    def unknown_flight(self, outcome: Outcome) -> None: ...

    def left(self, pool: str, address: str) -> None: ...


class Quiet:
    """An observer that does nothing; also the base of those that want only some events."""

    def decided(self, decision: Decision) -> None:
        """A request was routed."""

    def refused(self, reject: Reject, pool: str | None) -> None:
        """A request was refused."""

    def ended(self, ended: Ended) -> None:
        """A flight ended."""

    def unknown_flight(self, outcome: Outcome) -> None:
        """An end came for a flight that is not open."""

    def left(self, pool: str, address: str) -> None:
        """A replica is no longer a member."""


class Several(Quiet):
    """Hands each event to several observers in turn."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def decided(self, decision: Decision) -> None:
        for observer in self._observers:
            observer.decided(decision)

    def refused(self, reject: Reject, pool: str | None) -> None:
        for observer in self._observers:
            observer.refused(reject, pool)

    def ended(self, ended: Ended) -> None:
        for observer in self._observers:
            observer.ended(ended)

    def unknown_flight(self, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.unknown_flight(outcome)

    def left(self, pool: str, address: str) -> None:
        for observer in self._observers:
            observer.left(pool, address)
