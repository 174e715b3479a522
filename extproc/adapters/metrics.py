"""Prometheus metrics: one observer of the router's records, and gauges read from it when a scrape comes.

Labels are bounded: pools, policies and reasons come from configuration and code, replicas from discovery (series of a
replica that left are removed), outcomes and refusals are enums. No label ever comes from a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.core.fleet import FAILED_OPEN
from extproc.core.health.states import State
from extproc.core.observers import Ended, HealthChanged, Quiet
from extproc.core.router import Router
from extproc.core.types import Decision, End, Outcome, Reject

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)
RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
"""Predicted over actual: 0.9 to 1.1 is right."""
OUTSIDE = "outside"
"""Stands for the replica where a provider was asked."""
DECIDING = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)


class RouterMetrics(Quiet):
    """Observer of a router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"extproc_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"extproc_{name}", text, labels, buckets=buckets, registry=registry)

        self.decisions = counter(
            "decisions", "Requests routed, by the replica chosen.", "pool", "policy", "reason", "replica"
        )
        self.refusals = counter("refusals", "Requests refused by the router.", "pool", "reason")
        self.outcomes = counter("outcomes", "Ends of flights.", "pool", "replica", "outcome")
        self.moved = counter("moved", "Flights served by an alternate instead of the first choice.", "pool")
        self.unknown = counter(
            "unknown_flights", "Ends of flights that were not open: late, doubled, or not ours.", "outcome"
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens as reported by usage.", "pool", "replica")
        self.output_tokens = counter(
            "output_tokens", "Output tokens, reported or estimated by response size.", "pool", "replica"
        )
        self.predicted_hits = counter(
            "predicted_cached_tokens", "Prompt tokens predicted to be cached, where usage tells the truth.", "pool"
        )
        self.actual_hits = counter("actual_cached_tokens", "Prompt tokens that were cached, as reported.", "pool")
        self.prefix_sources = counter(
            "prefix_sources",
            "Requests routed, by what told how much of the prompt was cached: the replica's KV events (exact), or what was sent there.",
            "pool",
            "source",
        )
        self.hit_predictions = counter(
            "hit_predictions",
            "Cached tokens predicted, by what told of them, and whether as many (right), fewer or more were reported.",
            "pool",
            "source",
            "reported",
        )
        self.prompt_ratio = histogram(
            "prompt_tokens_predicted_ratio", "Estimated over actual prompt tokens.", RATIO, "pool"
        )
        self.output_ratio = histogram(
            "output_tokens_predicted_ratio", "Expected over actual output tokens.", RATIO, "pool"
        )
        self.output_p90 = counter(
            "output_p90",
            "Whole answers whose length is known from usage, to hold against the p90 predicted.",
            "pool",
        )
        self.output_within_p90 = counter(
            "output_within_p90",
            "Of extproc_output_p90_total, those no longer than predicted: 85 to 95 % if calibrated.",
            "pool",
        )
        self.ttft_ratio = histogram(
            "ttft_predicted_ratio", "Predicted over actual seconds to first token.", RATIO, "pool"
        )
        self.ttft = histogram(
            "ttft_seconds", "From the client's request to the first byte of the body, streams.", SECONDS, "pool"
        )
        self.duration = histogram("duration_seconds", "From the client's request to the end.", SECONDS, "pool")
        self.prompt_size = histogram("request_prompt_tokens", "Prompt tokens per request, estimated.", TOKENS, "pool")
        self.deciding = histogram("decision_seconds", "Reading a request and choosing its replica.", DECIDING)
        self.scrapes = counter("scrapes", "Scrapes of replicas' metrics.", "pool", "result")
        self.probes = counter("probes", "Active checks of replicas.", "pool", "probe", "result")
        self.health_changes = counter(
            "health_changes",
            "Changes of a replica's state, by the state it came to and why.",
            "pool",
            "replica",
            "state",
            "reason",
        )
        self.failed_open = counter(
            "failed_open", "Requests routed though every replica they may go to is out: to the least bad one.", "pool"
        )
        self.lora_requests = counter(
            "lora_requests",
            "Requests routed that need a LoRA adapter, by whether the replica was expected to hold it or to load it first.",
            "pool",
            "adapter",
        )
        self.discovery_errors = counter("discovery_errors", "Discovery sources that could not be read.", "pool")

        self._children: dict[tuple[Any, ...], Any] = {}
        self._members: set[str] = set()
        """Replicas named by a decision that have not left: an end that comes later must not bring their series back."""

    def _of(self, metric: Counter | Histogram, *labels: str) -> Any:
        """The series with these labels. `labels()` itself takes 2 us, ten times a request."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def decided(self, decision: Decision) -> None:
        pool = decision.pool
        self._members.update(decision.endpoints)
        replica = decision.endpoints[0] if decision.endpoints else OUTSIDE
        self._of(self.decisions, pool, decision.policy, decision.reason, replica).inc()
        self._of(self.prompt_size, pool).observe(decision.prompt_tokens)
        self._of(self.prefix_sources, pool, decision.prefix_source.value).inc()
        if decision.reason == FAILED_OPEN:
            self._of(self.failed_open, pool).inc()
        if (load_s := decision.prediction.load_s) is not None:
            self._of(self.lora_requests, pool, "loaded" if load_s else "held").inc()

    def health_changed(self, change: HealthChanged) -> None:
        self._of(self.health_changes, change.pool, change.address, change.after.value, change.reason.value).inc()

    def decided_in(self, seconds: float) -> None:
        """How long one decision took, the body's parsing included."""
        self.deciding.observe(seconds)

    def refused(self, reject: Reject, pool: str | None) -> None:
        self._of(self.refusals, pool or "none", reject.refusal.value).inc()

    def ended(self, ended: Ended) -> None:
        flight, outcome = ended.flight, ended.outcome
        pool = flight.pool
        replica = (outcome.served or flight.address) if flight.address else OUTSIDE
        if replica not in self._members and flight.address:
            replica = "departed"
        self._of(self.outcomes, pool, replica, outcome.end.value).inc()
        if ended.moved:
            self._of(self.moved, pool).inc()
        if ended.output_tokens:
            self._of(self.output_tokens, pool, replica).inc(ended.output_tokens)
            if flight.output_tokens:
                expected = flight.output_tokens * flight.samples
                self._of(self.output_ratio, pool).observe(expected / ended.output_tokens)
        if outcome.duration_s is not None:
            self._of(self.duration, pool).observe(outcome.duration_s)
        self._usage(ended, replica)
        self._cover(ended)
        self._first_token(ended)

    def unknown_flight(self, outcome: Outcome) -> None:
        self._of(self.unknown, outcome.end.value).inc()

    def _usage(self, ended: Ended, replica: str) -> None:
        flight, usage = ended.flight, ended.outcome.usage
        if usage is None or not usage.prompt_tokens:
            return
        self._of(self.prompt_tokens, flight.pool, replica).inc(usage.prompt_tokens)
        self._of(self.prompt_ratio, flight.pool).observe(flight.prompt_tokens / usage.prompt_tokens)
        if usage.cached_tokens is not None and not ended.moved:
            self._of(self.predicted_hits, flight.pool).inc(flight.prediction.cached_tokens)
            self._of(self.actual_hits, flight.pool).inc(usage.cached_tokens)
            reported = _against(usage.cached_tokens, flight.prediction.cached_tokens)
            self._of(self.hit_predictions, flight.pool, flight.prefix_source.value, reported).inc()

    def _cover(self, ended: Ended) -> None:
        """Whether the answer was as short as the p90 said. Of several samples only the sum is known, and a mean varies less."""
        flight, outcome = ended.flight, ended.outcome
        tokens = outcome.usage.completion_tokens if outcome.usage else None
        if outcome.end is not End.OK or tokens is None or flight.samples != 1 or not flight.output_p90_tokens:
            return
        self._of(self.output_p90, flight.pool).inc()
        if tokens <= flight.output_p90_tokens:
            self._of(self.output_within_p90, flight.pool).inc()

    def _first_token(self, ended: Ended) -> None:
        flight, outcome = ended.flight, ended.outcome
        if not flight.shows_first_token or outcome.ttft_s is None:
            return
        self._of(self.ttft, flight.pool).observe(outcome.ttft_s)
        if outcome.replica_ttft_s and not ended.moved:
            self._of(self.ttft_ratio, flight.pool).observe(flight.prediction.ttft_s / outcome.replica_ttft_s)

    def left(self, pool: str, address: str) -> None:
        """Drop the series of a replica that is no longer a member: addresses of pods never come back."""
        self._members.discard(address)
        self._children = {key: child for key, child in self._children.items() if address not in key[1:]}
        for metric in (self.decisions, self.outcomes, self.prompt_tokens, self.output_tokens, self.health_changes):
            metric.remove_by_labels({"pool": pool, "replica": address})


def _against(reported: int, predicted: int) -> str:
    if reported == predicted:
        return "right"
    return "more" if reported > predicted else "fewer"


class ServerCollector(Collector):
    """What the gRPC services counted, read when asked: counting in plain integers keeps it off the hot path.

    Takes any objects with integer fields; each field becomes a label value.
    """

    def __init__(self, streams: Any, entries: Any) -> None:
        self._counted = (
            ("extproc_streams", "ext_proc streams by what became of them; opened counts them all.", streams),
            (
                "extproc_access_log_entries",
                "Access log entries from Envoy; foreign ones have no flight of ours.",
                entries,
            ),
        )

    def collect(self) -> Iterator[Metric]:
        for name, text, counts in self._counted:
            family = CounterMetricFamily(name, text, labels=("kind",))
            for field in fields(counts):
                family.add_metric((field.name,), getattr(counts, field.name))
            yield family


class FleetCollector(Collector):
    """Gauges of every replica, read from the router when asked."""

    def __init__(self, router: Router, clock: Callable[[], float]) -> None:
        self._router = router
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        now = self._clock()

        def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"extproc_replica_{name}", text, labels=("pool", "replica", *labels))

        state = gauge("state", "1 for the state that the replica is in.", "state")
        in_flight = gauge("in_flight", "Requests routed there that have not ended.")
        held = gauge("held_tokens", "KV cache tokens that these are expected to hold.")
        queued = gauge("queued_prompt_tokens", "Uncached prompt tokens whose prefill is not done.")
        backlog = gauge("backlog_seconds", "Predicted seconds until that prefill is done.")
        age = gauge("sample_age_seconds", "Age of the last sample; absent before the first.")
        waiting = gauge("waiting", "Requests waiting in the engine, by the last sample.")
        running = gauge("running", "Requests running in the engine, by the last sample.")
        kv_usage = gauge("kv_usage_ratio", "KV cache in use by running requests, by the last sample.")
        strangers = gauge("strangers", "Requests there that did not come through here.")
        index = gauge("index_bytes", "Canonical prompt bytes that the replica is believed to have cached.")
        exact = gauge(
            "exact_blocks", "KV blocks that it holds by its own events; absent where these do not tell all of them."
        )
        prefill = gauge("prefill_factor", "Learned prefill time over the prior's.")
        decode = gauge("decode_factor", "Learned time per output token over the prior's.")
        trust = gauge("hit_trust_ratio", "Actual over predicted prefix hits, smoothed.")
        engine = gauge("engine", "1 for the engine whose metrics it has; unknown where they tell nothing.", "engine")
        gpu_use = gauge("gpu_use_ratio", "Share of the time with work on its GPUs, mean over them, by DCGM or NVML.")
        gpu_memory = gauge("gpu_memory_ratio", "Share of its GPUs' memory that is taken, mean over them.")
        for pool, member in self._router.members():
            key = (pool, member.address)
            current = member.state(now)
            for one in State:
                state.add_metric((*key, one.value), float(current is one))
            in_flight.add_metric(key, len(member.load))
            held.add_metric(key, member.load.held_tokens)
            queued.add_metric(key, member.load.queued_tokens(now))
            backlog.add_metric(key, member.load.backlog_s(now))
            strangers.add_metric(key, member.strangers)
            index.add_metric(key, self._router.pools[pool].index.held_bytes(member.address))
            known = self._router.pools[pool].caches.exact
            if known.knows(member.address):
                exact.add_metric(key, known.held(member.address))
            prefill.add_metric(key, member.speed.prefill_factor)
            decode.add_metric(key, member.speed.decode_factor)
            trust.add_metric(key, member.hit_trust)
            if member.scraped:
                engine.add_metric((*key, member.engine or "unknown"), 1.0)
            if (use := member.gpu_use(now)) is not None:
                gpu_use.add_metric(key, use)
            if member.gpu is not None and member.gpu.memory is not None:
                gpu_memory.add_metric(key, member.gpu.memory)
            if member.sampled_at is not None:
                age.add_metric(key, now - member.sampled_at)
            if member.sample is not None:
                for family, value in (
                    (waiting, member.sample.waiting),
                    (running, member.sample.running),
                    (kv_usage, member.sample.kv_usage),
                ):
                    if value is not None:
                        family.add_metric(key, value)
        yield from (state, in_flight, held, queued, backlog, age, waiting, running, kv_usage, strangers)
        yield from (index, exact, prefill, decode, trust, engine, gpu_use, gpu_memory)
        ignored = CounterMetricFamily(
            "extproc_cache_blocks_ignored",
            "Blocks that KV events told of and that are not in the index.",
            labels=("pool", "why"),
        )
        for name, each in self._router.pools.items():
            for why, blocks in each.caches.exact.ignored.items():
                ignored.add_metric((name, why.value), blocks)
        yield ignored
        load = GaugeMetricFamily(
            "extproc_lora_load_seconds", "Expected of loading a LoRA adapter, learned.", labels=("pool",)
        )
        for name, each in self._router.pools.items():
            if each.lora.holders:
                load.add_metric((name,), each.lora.load.s)
        yield load
        total = GaugeMetricFamily("extproc_in_flight", "Requests routed that have not ended, all pools.")
        total.add_metric((), self._router.in_flight)
        yield total
