"""Prometheus metrics of the queues: an observer of waits, and gauges read from the router when a scrape comes.

Labels are pools and outcomes. Tenants and priorities come from requests and are never labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.core.observers import Quiet, Waited
from extproc.core.router import Router
from extproc.core.types import Reject

WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0)


class Outcome(StrEnum):
    """How a wait ended."""

    ROUTED = "routed"
    REFUSED = "refused"
    LEFT = "left"  # the client did not wait


class QueueMetrics(Quiet):
    """Observer of a router: how long requests were held."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.waits = Histogram(
            "extproc_queue_wait_seconds",
            "Seconds for which requests were held, by how that ended; why they were refused is in extproc_refusals.",
            ("pool", "outcome"),
            buckets=WAITS,
            registry=registry,
        )

    def waited(self, waited: Waited) -> None:
        if waited.verdict is None:
            outcome = Outcome.LEFT
        else:
            outcome = Outcome.REFUSED if isinstance(waited.verdict, Reject) else Outcome.ROUTED
        self.waits.labels(waited.held.pool, outcome.value).observe(waited.waited_s)


class QueueCollector(Collector):
    """What is held, and what was sent off, of each pool."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("extproc_queue_requests", "Requests held.", labels=("pool",))
        size = GaugeMetricFamily("extproc_queue_bytes", "Bytes of the bodies of requests held.", labels=("pool",))
        tokens = GaugeMetricFamily(
            "extproc_queue_tokens",
            "Work held, in tokens: uncached prompt tokens, and expected output tokens counted twice.",
            labels=("pool",),
        )
        sent = CounterMetricFamily(
            "extproc_queue_dispatched_tokens",
            "Work, as in extproc_queue_tokens, sent to replicas while requests were held or had been lately; starved: before its turn, because it had waited too long.",
            labels=("pool", "turn"),
        )
        for name, pool in self._router.pools.items():
            admission = pool.admission
            requests.add_metric((name,), len(admission))
            size.add_metric((name,), admission.queue.bytes)
            tokens.add_metric((name,), admission.queue.tokens)
            sent.add_metric((name, "regular"), admission.sent_tokens - admission.starved_tokens)
            sent.add_metric((name, "starved"), admission.starved_tokens)
        yield from (requests, size, tokens, sent)
