"""Prometheus metrics of tenants and limits, read when a scrape comes.

Labels are tiers, refusals and ways to be known: all from configuration and code. A tenant is a label only where the configuration says so by
name (`tenants.named.NAME.metrics`); otherwise `tenant` is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.core.admission.limits import Limits


class TenantCollector(Collector):
    """What tenants asked for, and how they were known."""

    def __init__(
        self,
        limits: Limits,
        sources: Callable[[], Mapping[str, int]] = dict,
        key_errors: Callable[[], int] = lambda: 0,
        rounds: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """`sources` counts clients by how they were known, `rounds` round trips to the store and those that failed."""
        self._limits, self._sources, self._key_errors, self._rounds = limits, sources, key_errors, rounds

    def collect(self) -> Iterator[Metric]:
        limits = self._limits
        requests = CounterMetricFamily(
            "extproc_tenant_requests",
            "Requests of tenants: admitted, or the limit that refused them.",
            labels=("tier", "tenant", "result"),
        )
        for tally, count in limits.results.items():
            requests.add_metric((tally.tier, tally.label, tally.result), count)
        tokens = CounterMetricFamily(
            "extproc_tenant_tokens",
            "Prompt and output tokens of requests that ended: reported, else estimated.",
            labels=("tier", "tenant"),
        )
        for (tier, label), count in limits.tokens.items():
            tokens.add_metric((tier, label), count)
        known = CounterMetricFamily(
            "extproc_clients", "Requests by how their client was known; refused got 401.", labels=("source",)
        )
        for source, count in self._sources().items():
            known.add_metric((str(source),), count)
        errors = CounterMetricFamily(
            "extproc_key_file_errors", "Versions of the file of keys that could not be used.", value=self._key_errors()
        )
        yield from (requests, tokens, known, errors, *self._shared())

    def _shared(self) -> Iterator[Metric]:
        rounds, failed = self._rounds()
        family = CounterMetricFamily(
            "extproc_limit_rounds", "Round trips to Redis for limits that routers share.", labels=("result",)
        )
        family.add_metric(("ok",), rounds - failed)
        family.add_metric(("failed",), failed)
        yield family
        sharing = self._limits.sharing is not None
        yield GaugeMetricFamily(
            "extproc_limits_shared",
            "1 while limits are kept together with other routers, 0 while each router has its own.",
            value=float(sharing and not self._limits.away),
        )
