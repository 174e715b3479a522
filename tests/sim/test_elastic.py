"""A fleet whose size somebody decides on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from extproc.core.admission.settings import QueueSettings
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.types import End
from extproc.sim.cluster import Cluster, Result, Scenario
from extproc.sim.elastic import Control, Elastic, Scaling, Sight
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.sidecar import POOL, Wiring
from extproc.sim.traces import Trace, Turn


def steady(requests: int, every_s: float, output: int = 50) -> Trace:
    return Trace("steady", 64, tuple(Turn(2000, output, i * every_s) for i in range(requests)))


def run(
    control: Control, trace: Trace, initial: int = 1, cold_start_s: float = 60.0, wiring: Wiring | None = None
) -> tuple[Result, Elastic]:
    fleet = nodes([Group(gpu="a100", count=4)], "8b", 64, 0.002)
    scaling = Scaling(lambda: control, initial, cold_start_s)
    result = Cluster(Scenario(trace, fleet, scaling=scaling, wiring=wiring or Wiring()), "predicted").run()
    assert result.elastic is not None
    return result, result.elastic


def plan(*steps: tuple[float, int], first: int = 1) -> Callable[[Sight], int]:
    """So many from these moments on."""
    return lambda sight: ([first] + [n for at, n in steps if sight.now >= at])[-1]


def test_a_replica_that_is_asked_for_serves_after_its_cold_start() -> None:
    result, elastic = run(plan((15.0, 2)), steady(300, 0.5))
    assert elastic.sizes == [(0.0, 1), (15.0, 2)]
    second = [s.arrived_s for s in result.served if s.replica == "10.0.0.2:8000"]
    assert 75.0 <= min(second) < 90.0
    # One from the start and one from 15 s on, to the end.
    assert elastic.replica_s == pytest.approx(2 * result.lasted_s - 15.0)


def test_a_replica_that_is_given_up_finishes_what_it_has_and_is_paid_for_so_long() -> None:
    result, elastic = run(plan((30.0, 1), first=2), steady(200, 0.3, output=600), initial=2)
    assert all(s.end is End.OK for s in result.served)
    left = [s for s in result.served if s.replica == "10.0.0.2:8000"]
    assert max(s.arrived_s for s in left) <= 30.0
    last = max(s.arrived_s + s.e2e_s for s in left)
    assert last > 33.0
    assert elastic.replica_s == pytest.approx(result.lasted_s + last, abs=1.5)


def test_one_that_starts_is_given_up_first() -> None:
    result, elastic = run(plan((15.0, 3), (45.0, 2), (60.0, 1), first=2), steady(200, 0.5), initial=2)
    # The third was paid for 30 s and never served; the second went when one was asked for.
    assert "10.0.0.3:8000" not in {s.replica for s in result.served}
    assert elastic.replica_s == pytest.approx(result.lasted_s + 60.0 + 30.0, abs=5.0)
    assert elastic.events == 3


def test_one_that_comes_back_begins_anew() -> None:
    result, _ = run(plan((30.0, 1), (60.0, 2), first=2), steady(400, 0.5), initial=2)
    second = sorted(s.arrived_s for s in result.served if s.replica == "10.0.0.2:8000")
    assert any(b - a > 60.0 for a, b in pairwise(second))
    assert max(second) > 120.0


def test_what_may_be_seen() -> None:
    sights: list[Sight] = []

    def control(sight: Sight) -> int:
        sights.append(sight)
        return 1

    run(control, steady(400, 0.1))
    assert [s.now for s in sights[:3]] == [15.0, 30.0, 45.0]
    assert max(s.queue for s in sights) > 5
    assert all(s.gpu is not None and 0.9 < s.gpu <= 1.0 for s in sights[:2])
    assert {s.ready for s in sights} == {1}


def test_from_zero_the_first_request_waits_for_its_replica() -> None:
    wiring = Wiring(scaling=ScalingSettings(min_replicas=0), queue=QueueSettings(absent_wait_s=120.0))

    def control(sight: Sight) -> int:
        scaling = sight.router.pools[POOL].scaling
        assert scaling is not None
        assert scaling.asked is not None
        return scaling.asked

    trace = Trace("late", 64, tuple(Turn(500, 20, 20.0 + i) for i in range(5)))
    result, elastic = run(control, trace, initial=0, wiring=wiring)
    assert all(s.end is End.OK for s in result.served)
    assert elastic.sizes[1][1] == 1
    assert all(s.held_s is not None and 50.0 < s.held_s < 80.0 for s in result.served)
