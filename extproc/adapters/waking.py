"""Which replicas are looked at soon: those that were given work, and those that are in doubt."""

from __future__ import annotations

from collections.abc import Callable

from extproc.core.health.states import State
from extproc.core.lora import UNKNOWN
from extproc.core.observers import Ended, HealthChanged, Quiet
from extproc.core.types import (
    Decision,
    End,
)

DOUBT = frozenset({State.STARTING, State.SUSPECT, State.OPEN, State.PROBATION})
"""States that a check may change, so that replicas in them are checked at the shorter interval."""


class Waker(Quiet):
    """Has a replica scraped soon after it was given work, and scraped and checked soon after doubt arose."""

    def __init__(
        self,
        scrape: Callable[[str], None],
        probe: Callable[[str], None],
        list_models: Callable[[str], None],
        tell: Callable[[], None],
    ) -> None:
        """`tell`: the proxy has to hear of a change."""
        self._scrape = scrape
        self._probe = probe
        self._list_models = list_models
        self._tell = tell

    def decided(self, decision: Decision) -> None:
        if decision.endpoints:
            self._scrape(decision.endpoints[0])
        if decision.prefiller is not None:
            self._scrape(decision.prefiller)

    def ended(self, ended: Ended) -> None:
        if not ended.flight.address:
            return  # to a provider
        if ended.moved or ended.outcome.broken or ended.outcome.end in (End.UNREACHABLE, End.UPSTREAM_ERROR):
            self._scrape(ended.flight.address)  # passed over until it is heard of again
            self._probe(ended.flight.address)
        if ended.flight.adapter is not None and ended.outcome.status == UNKNOWN:
            self._list_models(ended.flight.at)  # it may have been unloaded there

    def health_changed(self, change: HealthChanged) -> None:
        self._tell()
        if change.after in DOUBT:
            self._probe(change.address)
