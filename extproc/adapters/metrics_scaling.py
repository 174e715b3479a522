"""Prometheus metrics of the scaling signal, read from the router when a scrape comes; only of pools that scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.core.router import Router


class ScalingCollector(Collector):
    """What each pool should have, and why."""

    def __init__(self, router: Router, clock: Callable[[], float]) -> None:
        self._router = router
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"extproc_{name}", text, labels=("pool", *labels))

        desired = gauge(
            "desired_replicas",
            "Replicas that the pool should have, cooldowns and steps observed; absent until its members are known.",
        )
        needed = gauge("needed_replicas", "Replicas that the rule says are needed, before cooldowns and steps.")
        work = gauge(
            "work_seconds_per_second",
            "Work that arrives, in seconds of a replica each second: prompts, and output at the batch that a replica can hold. Others' requests are counted in as far as they are seen on replicas.",
            "kind",
        )
        capacity = gauge(
            "replica_capacity_seconds_per_second",
            "Such work that one replica does within the SLO; absent while none arrives.",
        )
        late = gauge("late_requests", "Requests that wait for longer than the target, in requests of the usual size.")
        p95 = gauge("ttft_p95_seconds", "95th percentile of TTFT over the last minute; absent with too few requests.")
        replicas = gauge(
            "scaling_replicas",
            "Replicas by what they are to the pool: active (needed), warm (spare), activating (asked for, not there yet), draining.",
            "role",
        )
        changes = CounterMetricFamily(
            "extproc_scaling_changes", "Changes of extproc_desired_replicas.", labels=("pool",)
        )
        now = self._clock()
        for name, pool in self._router.pools.items():
            if pool.scaling is None:
                continue
            key, look = (name,), pool.scaling.last
            if (asked := pool.scaling.asked) is None:
                continue
            desired.add_metric(key, asked)
            changes.add_metric(key, pool.scaling.changes)
            for role, count in pool.scaling.roles(pool.fleet, now).items():
                replicas.add_metric((name, role.value), count)
            if look is None:
                continue
            needed.add_metric(key, look.need.up_to)
            work.add_metric((name, "prefill"), look.fill_s)
            work.add_metric((name, "decode"), look.decode_s)
            late.add_metric(key, look.seen.late_requests)
            for family, value in ((capacity, look.capacity_s), (p95, look.seen.ttft_p95_s)):
                if value is not None:
                    family.add_metric(key, value)
        yield from (desired, needed, work, capacity, late, p95, replicas, changes)
