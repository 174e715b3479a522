"""Prometheus metrics of models, their versions and providers.

Labels are names of the configuration: a model counts under its own name whatever alias was asked for, and what the catalog does not have
is not counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.adapters.metrics import SECONDS
from extproc.core.observers import Ended, Quiet
from extproc.core.router import Router


class ModelMetrics(Quiet):
    """Observer that counts by target and version, so that versions can be held against each other."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("model", "target", "version")
        self._requests = Counter(
            "extproc_model_requests",
            "Requests for configured models that ended, by pool or provider, version and end.",
            (*labels, "end"),
            registry=registry,
        )
        self._ttft = Histogram(
            "extproc_model_ttft_seconds",
            "From the client's request to the first byte of the body, streams of configured models.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self._children: dict[tuple[str, ...], Any] = {}

    def ended(self, ended: Ended) -> None:
        flight, outcome = ended.flight, ended.outcome
        if flight.target is None:
            return
        labels = (flight.target.model, flight.target.to, flight.target.version)
        self._of(self._requests, *labels, outcome.end.value).inc()
        if flight.shows_first_token and outcome.ttft_s is not None:
            self._of(self._ttft, *labels).observe(outcome.ttft_s)

    def _of(self, metric: Counter | Histogram, *labels: str) -> Any:
        """The series with these labels; `labels()` itself takes 2 us. Of the two only one has an end, so labels tell them apart."""
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = metric.labels(*labels)
        return child


class ModelCollector(Collector):
    """What went to others than the first target, and what providers cost, read when asked."""

    def __init__(self, router: Router, clock: Callable[[], float]) -> None:
        self._router, self._clock = router, clock

    def collect(self) -> Iterator[Metric]:
        spilled = CounterMetricFamily(
            "extproc_model_spilled",
            "Requests for configured models that went on to this target, by what the first one said.",
            labels=("model", "target", "reason"),
        )
        for (model, target, why), count in self._router.steering.spilled.items():
            spilled.add_metric((model, target, why.value), count)
        yield spilled
        yield from self._providers()

    def _providers(self) -> Iterator[Metric]:
        now, labels = self._clock(), ("provider",)
        cost = CounterMetricFamily(
            "extproc_provider_cost_dollars", "Dollars for requests that ended, by price and usage.", labels=labels
        )
        tokens = CounterMetricFamily(
            "extproc_provider_tokens", "Tokens of these requests, reported or estimated.", labels=(*labels, "kind")
        )
        running = GaugeMetricFamily("extproc_provider_in_flight", "Requests there that have not ended.", labels=labels)
        spent = GaugeMetricFamily(
            "extproc_provider_spent_dollars",
            "Dollars of the last 24 hours, requests in flight as expected.",
            labels=labels,
        )
        used = GaugeMetricFamily("extproc_provider_spent_tokens", "Tokens, likewise.", labels=labels)
        out = GaugeMetricFamily(
            "extproc_provider_out", "Whether it is passed over because its last requests failed.", labels=labels
        )
        for name, provider in self._router.steering.providers.items():
            out.add_metric((name,), provider.absent(now))
            cost.add_metric((name,), provider.paid_dollars)
            for kind in ("prompt", "output"):
                tokens.add_metric((name, kind), provider.used_tokens[kind])
            running.add_metric((name,), len(provider))
            spent.add_metric((name,), provider.dollars.spent(now))
            used.add_metric((name,), provider.tokens.spent(now))
        yield from (cost, tokens, running, spent, used, out)
