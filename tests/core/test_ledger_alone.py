"""Replicas that tell nothing of their load: what was sent there from here carries every decision."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from extproc.core.health.states import State
from extproc.core.router import PoolSettings, Router
from extproc.core.types import End, NotSampled, Outcome, Probe, Probed, Replica, Reset, Route, ScrapeFailure

from .support import address, request, text

N = 4
POLICIES = ("predicted", "least_request", "least_queue", "least_kv", "gpu_utilization", "token_aware")


def blind(policy: str, scraped: bool, why: ScrapeFailure = ScrapeFailure.STATUS) -> Router:
    """A pool whose checks are well and whose metrics bring nothing."""
    made = Router([PoolSettings("default", policy=policy, scraped=scraped)], Random(1))
    made.learn(Reset("default", tuple(Replica(address(i)) for i in range(N))), 0.0)
    for i in range(N):
        made.learn(NotSampled("default", address(i), why), 0.1)
        made.learn(Probed("default", address(i), Probe.LIVE, ok=True), 0.2)
        made.learn(Probed("default", address(i), Probe.READY, ok=True), 0.3)
    return made


@pytest.mark.parametrize("scraped", [True, False], ids=["engine unknown", "engine none"])
@pytest.mark.parametrize("policy", POLICIES)
def test_load_is_spread_by_our_own_books(policy: str, scraped: bool) -> None:
    made = blind(policy, scraped)
    sent = [made.arrive(request(text(2000, n)), 1.0 + n * 1e-3) for n in range(10 * N)]
    counts = Counter(route.endpoints[0] for route in sent if isinstance(route, Route))
    assert counts.total() == 10 * N
    assert max(counts.values()) - min(counts.values()) <= 2, counts


@pytest.mark.parametrize("why", [ScrapeFailure.STATUS, ScrapeFailure.UNREADABLE])
def test_checks_alone_make_it_ready(why: ScrapeFailure) -> None:
    made = blind("predicted", scraped=True, why=why)
    assert {member.state(20.0) for _, member in made.members()} == {State.READY}


def test_what_ended_makes_room_again() -> None:
    made = blind("least_queue", scraped=True)
    routes = [made.arrive(request(text(2000, n)), 1.0) for n in range(2 * N)]
    freed = next(r for r in routes if isinstance(r, Route) and r.endpoints[0] == address(2))
    made.finish(freed.flight, Outcome(End.OK, 200, address(2), duration_s=1.0), 2.0)
    nxt = made.arrive(request(text(2000, 99)), 2.1)
    assert isinstance(nxt, Route)
    assert nxt.endpoints[0] == address(2)
