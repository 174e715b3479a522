"""Spare replicas."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from extproc.core.router import Router
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.scaling.warm import Role, WarmPool, WarmSettings, roles
from extproc.core.settings import PoolSettings
from extproc.core.types import DrainAsked, Reset
from tests.core.support import POOL, address, replicas

FIELD = WarmSettings(min_replicas=2, max_replicas=5, ttl_s=3600.0)


def test_some_are_always_there() -> None:
    pool = WarmPool(FIELD)
    assert [pool.take(3, 3, at) for at in (0.0, 5000.0)] == [2, 2]


def test_those_no_longer_needed_stay_for_an_hour_but_no_more_than_the_most() -> None:
    pool = WarmPool(FIELD)
    assert pool.take(10, 8, 0.0) == 4
    assert pool.take(8, 4, 100.0) == 5
    assert pool.take(4, 4, 3599.0) == 5
    assert pool.take(4, 4, 3600.0) == 3  # the two of the beginning are gone, the one that came after them stays
    assert pool.take(4, 4, 3700.0) == 2


def test_spares_become_needed_again_the_youngest_first() -> None:
    pool = WarmPool(FIELD)
    pool.take(10, 9, 0.0)
    pool.take(9, 8, 1000.0)
    assert pool.take(8, 9, 2000.0) == 3
    assert pool.take(9, 9, 3600.0) == 2


def test_roles_add_up() -> None:
    assert roles(asked=6, needed=4, present=5, draining=1) == {
        Role.WARM: 1,
        Role.ACTIVATING: 1,
        Role.ACTIVE: 4,
        Role.DRAINING: 1,
    }
    assert roles(asked=2, needed=2, present=4, draining=0) == {
        Role.WARM: 0,
        Role.ACTIVATING: 0,
        Role.ACTIVE: 2,
        Role.DRAINING: 0,
    }


def test_a_pool_asks_for_its_spares_too() -> None:
    settings = ScalingSettings(min_replicas=1, max_replicas=8, warm=FIELD)
    made = Router([PoolSettings(POOL, scraped=False, scaling=settings)], Random(1))
    made.learn(Reset(POOL, replicas(5)), 0.0)
    made.expire(0.0)
    scaling = made.pools[POOL].scaling
    assert scaling is not None
    assert scaling.asked == 5  # three that may be needed, and two spares
    for at in range(15, 4300, 15):
        made.expire(float(at))
        if at == 1500:
            assert scaling.asked == 5  # two of the three turned out to be spares, and stay
    assert scaling.asked == 3
    made.learn(DrainAsked(POOL, address(4)), 4300.0)
    counts = scaling.roles(made.pools[POOL].fleet, 4300.0)
    assert counts == {Role.WARM: 2, Role.ACTIVATING: 0, Role.ACTIVE: 1, Role.DRAINING: 1}


def test_more_than_the_pool_may_have_is_never_asked_for() -> None:
    settings = ScalingSettings(min_replicas=1, max_replicas=3, warm=replace(FIELD, min_replicas=4))
    made = Router([PoolSettings(POOL, scraped=False, scaling=settings)], Random(1))
    made.learn(Reset(POOL, ()), 0.0)
    made.expire(0.0)
    scaling = made.pools[POOL].scaling
    assert scaling is not None
    assert scaling.asked == 3
