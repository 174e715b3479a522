"""Who wants to know what the router does: metrics, the recorder of decisions, tests. One record each, handed to all."""

from __future__ import annotations

from typing import Protocol

from extproc.core.flights import Flight
from extproc.core.health.states import Reason, State
from extproc.core.record import record
from extproc.core.types import Decision, Outcome, Reject, Route


@record
class Ended:
    """A flight that ended, with what was predicted and what came: one record for metrics, logs and learning."""

    flight: Flight
    outcome: Outcome
    moved: bool
    """Served by another replica than the first of the list."""
    output_tokens: int | None
    """Reported, or estimated from the size of the response; None when there is nothing to go by."""


@record
class Held:
    """A request that waits here."""

    pool: str
    ticket: str
    priority: int
    tenant: str | None


@record
class Waited:
    """The end of a wait: routed, refused or, where `verdict` is None, left by its client."""

    held: Held
    waited_s: float
    verdict: Route | Reject | None


@record
class HealthChanged:
    """A replica went from one state to another."""

    pool: str
    address: str
    before: State
    after: State
    reason: Reason


class Observer(Protocol):
    """Whoever wants to know: metrics, the recorder of decisions, tests."""

    def decided(self, decision: Decision) -> None: ...

    def refused(self, reject: Reject, pool: str | None) -> None: ...

    def ended(self, ended: Ended) -> None: ...

    def unknown_flight(self, outcome: Outcome) -> None: ...

    def left(self, pool: str, address: str) -> None: ...

    def held(self, held: Held) -> None: ...

    def waited(self, waited: Waited) -> None: ...

    def health_changed(self, change: HealthChanged) -> None: ...


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

    def held(self, held: Held) -> None:
        """A request waits."""

    def waited(self, waited: Waited) -> None:
        """A wait ended."""

    def health_changed(self, change: HealthChanged) -> None:
        """A replica is in another state."""


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

    def held(self, held: Held) -> None:
        for observer in self._observers:
            observer.held(held)

    def waited(self, waited: Waited) -> None:
        for observer in self._observers:
            observer.waited(waited)

    def health_changed(self, change: HealthChanged) -> None:
        for observer in self._observers:
            observer.health_changed(change)
