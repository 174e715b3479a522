"""The series of the scaling signal."""

from __future__ import annotations

from random import Random

from prometheus_client import CollectorRegistry

from extproc.adapters.metrics_scaling import ScalingCollector
from extproc.core.router import Router
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.settings import PoolSettings
from extproc.core.types import Reset
from tests.core.support import MODEL, POOL, replicas, request, text


def made(scaling: ScalingSettings | None) -> tuple[Router, CollectorRegistry]:
    pools = [PoolSettings(POOL, (MODEL,), scraped=False, scaling=scaling), PoolSettings("other", ("x",))]
    router = Router(pools, Random(1))
    registry = CollectorRegistry()
    registry.register(ScalingCollector(router, lambda: 0.0))
    return router, registry


def test_pools_that_scale_say_what_they_want_and_why() -> None:
    router, registry = made(ScalingSettings())

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"extproc_{name}", {"pool": POOL, **labels})

    router.expire(0.0)
    assert value("desired_replicas") is None
    router.learn(Reset(POOL, replicas(2)), 0.0)
    router.expire(0.0)
    assert [value("scaling_replicas", role=role) for role in ("active", "warm", "activating", "draining")] == [
        2,
        0,
        0,
        0,
    ]
    assert value("desired_replicas") == 2
    assert value("replica_capacity_seconds_per_second") is value("ttft_p95_seconds") is None
    for i in range(60):
        router.arrive(request(text(4000, seed=i)), i / 4)
    router.expire(15.0)
    assert (value("needed_replicas"), value("scaling_changes_total")) == (1, 0)
    prefill, decode = (value("work_seconds_per_second", kind=kind) for kind in ("prefill", "decode"))
    assert prefill is not None
    assert decode is not None
    assert 0.01 < prefill < 0.3
    assert 0.01 < decode < 0.3
    capacity = value("replica_capacity_seconds_per_second")
    assert capacity is not None
    assert 0.1 < capacity < 0.91
    assert value("late_requests") == 0.0


def test_a_pool_that_does_not_scale_has_no_series() -> None:
    _, registry = made(None)
    assert [sample for family in registry.collect() for sample in family.samples] == []
