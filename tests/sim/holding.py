"""A router that holds requests by simple rules, over one that serves: for tests of what stands around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from extproc.core.router import Router
from extproc.core.types import Fact, Outcome, Probed, Refusal, Reject, Request, Route, Turn, Verdict, Wait
from extproc.sim.cluster import Cluster


@dataclass(slots=True)
class _Held:
    request: Request
    since: float


@dataclass
class Holder:
    """Holds every request for `hold_s`; then it is routed, or refused where there is a `refusal`. `ready` may say so sooner."""

    router: Router
    hold_s: float
    refusal: Refusal | None = None
    ready: Callable[[Router], bool] = field(default=lambda _: False)
    wakeup: Callable[[float], float] = field(default=lambda at: at)
    """What it names for the end of the first wait."""
    finished: list[Outcome] = field(default_factory=list)
    checks: list[tuple[float, Probed]] = field(default_factory=list)
    asked: int = 0
    """For turns."""
    _held: dict[str, _Held] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)

    @property
    def holding(self) -> int:
        return len(self._held)

    def arrive(self, request: Request, now: float) -> Verdict:
        ticket = f"t{request.session}-{now}-{len(self._held)}"
        self._held[ticket] = _Held(request, now)
        return Wait(ticket, now + self.hold_s)

    def turns(self, now: float) -> list[Turn]:
        self.asked += 1
        found = []
        for ticket, held in list(self._held.items()):
            if now >= held.since + self.hold_s or self.ready(self.router):
                del self._held[ticket]
                found.append(Turn(ticket, self._verdict(held.request, now)))
        return found

    def _verdict(self, request: Request, now: float) -> Route | Reject:
        if self.refusal:
            return Reject(self.refusal)
        verdict = self.router.arrive(request, now)
        assert isinstance(verdict, Route)
        return verdict

    def next_wakeup(self) -> float | None:
        return min((self.wakeup(held.since + self.hold_s) for held in self._held.values()), default=None)

    def finish(self, flight: str, outcome: Outcome, now: float) -> None:
        self.finished.append(outcome)
        self.router.finish(flight, outcome, now)

    def learn(self, fact: Fact, now: float) -> None:
        if isinstance(fact, Probed):
            self.checks.append((now, fact))
        self.router.learn(fact, now)


def held_by(cluster: Cluster, hold_s: float, **how: Any) -> Holder:
    """Put one in the place of the cluster's only router."""
    (sidecar,) = cluster._sidecars
    holder = Holder(sidecar.router, hold_s, **how)
    sidecar.router = holder  # type: ignore[assignment]  # what the sidecar calls of it is there
    return holder
