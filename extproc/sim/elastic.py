"""A fleet whose size somebody decides on while the simulation runs: replicas that start cold, and drain before they go.

As under Kubernetes: whoever decides is asked now and then and names a number; those that start are given up first, then the
youngest; a replica is paid for from the moment at which it is asked for until the last of its requests has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from extproc.core.router import Router
from extproc.sim.node import Node
from extproc.sim.sidecar import POOL, Sidecar
from extproc.sim.timeline import Timeline

DRAINED_S: Final = 1.0
"""Between looks at whether a draining replica is empty."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What whoever decides may see."""

    now: float
    asked: int
    """Replicas that were asked for last."""
    ready: int
    """Replicas that take requests."""
    queue: int
    """Requests that wait, in routers and in engines."""
    gpu: float | None
    """Share of the time since the last look with a step under way, mean over the ready replicas; None of none."""
    router: Router


Control = Callable[[Sight], int]
"""How many replicas there should be from now on."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Who decides, and how long things take."""

    control: Callable[[], Control]
    """Makes one for each run: they remember."""
    initial: int = 1
    """Replicas that are there at the start."""
    cold_start_s: float = 120.0
    interval_s: float = 15.0
    """Between two looks: that of the HPA."""


@dataclass(slots=True)
class _Place:
    """One of the replicas that may be there."""

    node: Node
    paid_from: float | None = None
    """None while it is off."""
    ready_at: float | None = None
    draining: bool = False
    busy_s: float = 0.0
    """As of the last look."""

    @property
    def wanted(self) -> bool:
        return self.paid_from is not None and not self.draining


class Elastic:
    """The replicas of one run."""

    def __init__(
        self, scaling: Scaling, nodes: Sequence[Node], sidecars: Sequence[Sidecar], timeline: Timeline
    ) -> None:
        self.sizes: list[tuple[float, int]] = [(0.0, scaling.initial)]
        """(time, replicas asked for), one for each change."""
        self.replica_s = 0.0
        """Replica-seconds paid for; complete after `end`."""
        self._scaling = scaling
        self._control = scaling.control()
        self._sidecars = sidecars
        self._timeline = timeline
        self._places = [_Place(node) for node in nodes]
        for place in self._places[: scaling.initial]:
            place.paid_from = place.ready_at = 0.0
        timeline.at(scaling.interval_s, self._look)

    def __repr__(self) -> str:
        return f"<elastic {self.asked} asked for, {self.events} changes, {self.replica_s / 3600:.1f} replica-hours>"

    @property
    def asked(self) -> int:
        """Replicas that should be there."""
        return self.sizes[-1][1]

    @property
    def events(self) -> int:
        """How often that changed."""
        return len(self.sizes) - 1

    def end(self, now: float) -> None:
        """The run is over: settle what is still there."""
        for place in self._places:
            if place.paid_from is not None:
                self.replica_s += now - place.paid_from

    def _look(self, _: object) -> None:
        now = self._timeline.now
        wanted = min(max(self._control(self._sight()), 0), len(self._places))
        if wanted != self.asked:
            self.sizes.append((now, wanted))
        self._start(wanted - sum(p.wanted for p in self._places))
        self._stop(sum(p.wanted for p in self._places) - wanted)
        self._timeline.at(now + self._scaling.interval_s, self._look)

    def _sight(self) -> Sight:
        ready = [p for p in self._places if p.wanted and p.ready_at is not None]
        used = []
        for place in ready:
            before, place.busy_s = place.busy_s, place.node.busy_s
            used.append((place.busy_s - before) / self._scaling.interval_s)
        waiting = sum(p.node.waiting for p in self._places) + sum(s.router.holding for s in self._sidecars)
        return Sight(
            now=self._timeline.now,
            asked=self.asked,
            ready=len(ready),
            queue=waiting,
            gpu=min(sum(used) / len(used), 1.0) if used else None,
            router=self._sidecars[0].router,
        )

    def _start(self, count: int) -> None:
        off = [p for p in self._places if p.paid_from is None]
        for place in off[: max(count, 0)]:
            place.paid_from = self._timeline.now
            self._timeline.at(self._timeline.now + self._scaling.cold_start_s, self._started, (place, place.paid_from))

    def _started(self, started: tuple[_Place, float]) -> None:
        place, paid_from = started
        if place.paid_from != paid_from:
            return  # given up meanwhile
        place.ready_at, place.busy_s = self._timeline.now, place.node.busy_s
        place.node.start()
        for sidecar in self._sidecars:
            sidecar.joined(place.node.spec.replica)

    def _stop(self, count: int) -> None:
        wanted = [p for p in reversed(self._places) if p.wanted]
        youngest = sorted(wanted, key=lambda p: (p.ready_at is None, p.ready_at or 0.0), reverse=True)
        for place in youngest[: max(count, 0)]:
            if place.ready_at is None:
                self._off(place)
                continue
            place.draining = True
            for sidecar in self._sidecars:
                sidecar.drains(place.node.address)
            self._drained(place)

    def _drained(self, place: _Place) -> None:
        address = place.node.address
        held = (s.router.pools[POOL].fleet.get(address) for s in self._sidecars)
        if place.node.requests or any(len(member.load) for member in held if member is not None):
            self._timeline.at(self._timeline.now + DRAINED_S, self._drained, place)
            return
        for sidecar in self._sidecars:
            sidecar.left(address)
        place.node.die()
        self._off(place)

    def _off(self, place: _Place) -> None:
        assert place.paid_from is not None
        self.replica_s += self._timeline.now - place.paid_from
        place.paid_from = place.ready_at = None
        place.draining = False
