"""Prometheus metrics of KV events: what comes, what is missed, what is known. No samples where nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # it imports pyzmq, which only those have who listen
    from extproc.adapters.kv_events.follower import Counts
    from extproc.adapters.kv_events.following import Following

LAG_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds. vLLM 0.32: 1.6 ms as a median, 133 ms at worst under load."""


class EventMetrics:
    """Observed as messages come."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "extproc_kv_lag_seconds",
            "From the end of an engine's step to the receipt of its KV events, by two clocks; less than 0 counts as 0.",
            ("pool",),
            buckets=LAG_BUCKETS,
            registry=registry,
        )

    def lag(self, pool: str, seconds: float) -> None:
        """A message came so long after it was made."""
        self._lag.labels(pool).observe(max(seconds, 0.0))


class EventCollector(Collector):
    """Read when a scrape comes."""

    def __init__(self, following: Callable[[], Following | None]) -> None:
        self._following = following

    def collect(self) -> Iterator[Metric]:
        """All families, with samples of the pools whose KV events are or were followed."""
        following = self._following()
        counts = {} if following is None else dict(following.counts)
        yield _per_pool("messages", "Messages received, those of replays aside.", counts, lambda c: c.messages)
        yield _per_pool("undecodable", "Messages that could not be read.", counts, lambda c: c.undecodable)
        yield _per_pool("gaps", "Times at which messages were missing.", counts, lambda c: c.gaps)
        yield _per_pool("restarts", "Engines that were found to have begun anew.", counts, lambda c: c.restarts)
        yield _per_pool(
            "losses",
            "Times at which events were lost for good: the replica's cache is then known in part, until it is cleared or its engine restarts.",
            counts,
            lambda c: c.losses,
        )
        yield _labelled("replays", "Replays asked for, and what became of them.", "result", counts, lambda c: c.replays)
        yield _labelled("events", "Events learned from.", "type", counts, lambda c: c.events.taken)
        yield _labelled(
            "events_passed",
            "Events, or parts of them, that do not count, and why.",
            "why",
            counts,
            lambda c: c.events.passed,
        )
        strangers = CounterMetricFamily(
            "extproc_kv_strangers",
            "Messages to the bound socket whose topic names no replica of the pool.",
            labels=("pool",),
        )
        known = GaugeMetricFamily(
            "extproc_kv_known",
            "What KV events told of a replica's cache: 1 all of it, 0 a part, no sample: nothing yet. The least of its ranks.",
            labels=("pool", "replica"),
        )
        if following is not None:
            for pool in counts:
                strangers.add_metric((pool,), following.strangers(pool))
            for (pool, replica), whole in following.known().items():
                known.add_metric((pool, replica), float(whole))
        yield strangers
        yield known


def _per_pool(name: str, text: str, counts: Mapping[str, Counts], value: Callable[[Counts], int]) -> Metric:
    family = CounterMetricFamily(f"extproc_kv_{name}", text, labels=("pool",))
    for pool, each in counts.items():
        family.add_metric((pool,), value(each))
    return family


def _labelled(
    name: str, text: str, label: str, counts: Mapping[str, Counts], values: Callable[[Counts], Mapping[Any, int]]
) -> Metric:
    family = CounterMetricFamily(f"extproc_kv_{name}", text, labels=("pool", label))
    for pool, each in counts.items():
        for value, count in values(each).items():
            family.add_metric((pool, str(value)), count)
    return family
