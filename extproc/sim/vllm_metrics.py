"""The metrics page of a simulated replica, in the names and labels of vLLM 0.32."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.sim.engine import EngineConfig
from extproc.sim.realtime import RealtimeEngine

_TTFT_S: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
_E2E_S: Final = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_LABELS: Final = ("engine", "model_name")


class Metrics:
    """Everything that the page shows; `model` is the base model, also for requests to its adapters."""

    def __init__(self, live: RealtimeEngine, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(live, model))
        labels = {"engine": "0", "model_name": model}
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT_S, labels
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _E2E_S, labels
        )
        help_ = "Count of successfully processed requests."
        self._success = Counter(
            "vllm:request_success", help_, ("engine", "finished_reason", "model_name"), registry=self._registry
        )
        self._success_labels = labels
        for reason in ("stop", "length", "abort", "error", "repetition"):
            self._success.labels(finished_reason=reason, **labels)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...], labels: dict[str, str]) -> Histogram:
        parent = Histogram(f"vllm:{name}", help_, _LABELS, buckets=buckets, registry=self._registry)
        return parent.labels(**labels)

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def finished(self, seconds: float, reason: str) -> None:
        """Aborted requests never get here: in vLLM, too, they are not counted."""
        self._e2e.observe(seconds)
        self._success.labels(finished_reason=reason, **self._success_labels).inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine at the moment of a scrape."""

    def __init__(self, live: RealtimeEngine, model: str) -> None:
        self._live = live
        self._labels = ("0", model)
        self._created = time.time()

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield _cache_config(self._live.engine.config)
        if self._live.adapters_seen:
            yield self._lora()

    def _gauges(self) -> Iterator[Metric]:
        gauges = self._live.gauges
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", gauges.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", gauges.waiting)
        help_ = "Number of waiting requests by reason."
        by_reason = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", help_, labels=(*_LABELS, "reason"))
        by_reason.add_metric((*self._labels, "capacity"), gauges.waiting)
        by_reason.add_metric((*self._labels, "deferred"), 0)
        yield by_reason
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", gauges.kv_usage)

    def _counters(self) -> Iterable[Metric]:
        c = self._live.engine.counters
        queries = "Prefix cache queries, in terms of number of queried tokens."
        hits = "Prefix cache hits, in terms of number of cached tokens."
        return (
            self._counter("prefix_cache_queries", queries, c.prefix_queries),
            self._counter("prefix_cache_hits", hits, c.prefix_hits),
            self._counter("num_preemptions", "Cumulative number of preemption from the engine.", c.preemptions),
            self._counter("prompt_tokens", "Number of prefill tokens processed.", c.prompt_tokens),
            self._counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", c.prefix_hits),
            self._counter("generation_tokens", "Number of generation tokens processed.", c.generated_tokens),
        )

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", help_, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", help_, labels=_LABELS)
        family.add_metric(self._labels, value, created=self._created)
        return family

    def _lora(self) -> Metric:
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Running stats on lora requests.", labels=names)
        for told, at in self._live.adapters_seen.items():
            family.add_metric((str(told.slots), ",".join(told.running), ",".join(told.waiting)), at)
        return family


def _cache_config(config: EngineConfig) -> Metric:
    tokens = config.num_blocks * config.block_size
    info = {
        "block_size": config.block_size,
        "cache_dtype": "auto",
        "enable_prefix_caching": config.prefix_caching,
        "engine": 0,
        "gpu_memory_utilization": 0.92,
        "kv_cache_max_concurrency": tokens / config.max_model_len,
        "kv_cache_size_tokens": tokens,
        "num_cpu_blocks": None,
        "num_gpu_blocks": config.num_blocks,
        "num_gpu_blocks_override": config.num_blocks,
        "prefix_caching_hash_algo": "sha256",
        "sliding_window": None,
    }
    family = GaugeMetricFamily("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", labels=tuple(info))
    family.add_metric(tuple(map(str, info.values())), 1.0)
    return family
