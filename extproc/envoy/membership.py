"""Members of a pool as the proxy is to see them."""

from __future__ import annotations

from collections.abc import Iterable

from extproc.core import fleet
from extproc.core.health.states import State
from extproc.core.ranks import endpoint_of
from extproc.envoy.endpoints import Health, Member


def for_envoy(members: Iterable[fleet.Member], now: float) -> list[Member]:
    """Each address once, as well as the best of the ranks behind it."""
    found: dict[str, Member] = {}
    for member in members:
        endpoint, health = endpoint_of(member.address), _health(member.state(now))
        known = found.get(endpoint)
        if known is None or _BEST_FIRST.index(health) < _BEST_FIRST.index(known.health):
            found[endpoint] = Member(endpoint, health, member.replica.weight)
    return list(found.values())


_BEST_FIRST = (Health.HEALTHY, Health.DRAINING, Health.UNHEALTHY)


def _health(state: State) -> Health:
    """What Envoy's fallback policy is to make of it. Were all unhealthy, its panic threshold would take all the same."""
    if state in (State.OPEN, State.GONE):
        return Health.UNHEALTHY
    return Health.DRAINING if state is State.DRAINING else Health.HEALTHY
