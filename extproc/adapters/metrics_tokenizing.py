"""Prometheus metrics of the tokenizing of prompts. No samples where no pool has a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from extproc.core.observers import Ended, Quiet

if TYPE_CHECKING:  # it imports the libraries, which only those have who tokenize
    from extproc.adapters.tokenizing.tokenizing import Tokenizing

BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Seconds. A turn of a conversation takes 0.5 to 5 ms; the default bound is 50 ms."""


class TokenizingMetrics(Quiet):
    """Observed as requests come and end."""

    def __init__(self, registry: CollectorRegistry, tokenizing: Callable[[], Tokenizing | None]) -> None:
        self._tokenizing = tokenizing
        self._wait = Histogram(
            "extproc_tokenizing_seconds",
            "What requests waited for their prompts to be tokenized, those that were given up included.",
            ("pool",),
            buckets=BUCKETS,
            registry=registry,
        )

    def took(self, pool: str, seconds: float) -> None:
        """A request waited so long."""
        self._wait.labels(pool).observe(seconds)

    def ended(self, ended: Ended) -> None:
        """Compare the prompt's size with what the engine says of it."""
        flight, usage, tokenizing = ended.flight, ended.outcome.usage, self._tokenizing()
        if tokenizing is None or usage is None or usage.prompt_tokens is None or not flight.tokenized:
            return
        tokenizing.told(flight.pool, flight.prompt_tokens, usage.prompt_tokens)


class TokenizingCollector(Collector):
    """Read when a scrape comes."""

    def __init__(self, tokenizing: Callable[[], Tokenizing | None]) -> None:
        self._tokenizing = tokenizing

    def collect(self) -> Iterator[Metric]:
        """All families, with samples of the pools that have a tokenizer."""
        prompts = CounterMetricFamily(
            "extproc_tokenized_prompts",
            "Prompts by what became of them: tokenized, or why not, so that what is cached of them was guessed.",
            labels=("pool", "result"),
        )
        told = CounterMetricFamily(
            "extproc_prompt_tokens_told",
            "Tokenized prompts whose tokens the engine counted: as many as were found here, or others. Others show a wrong tokenizer.",
            labels=("pool", "result"),
        )
        trusted = GaugeMetricFamily(
            "extproc_tokenizer_trusted",
            "1, or 0 once the engine counted otherwise too often: prompts are not tokenized any more.",
            labels=("pool",),
        )
        held = GaugeMetricFamily(
            "extproc_tokenizer_cache_bytes", "Taken up by pieces of prompts and their tokens.", labels=("pool",)
        )
        pieces = CounterMetricFamily(
            "extproc_tokenizer_characters",
            "Characters of prompts by whether their tokens were found in the cache or made. Pools with one tokenizer share these.",
            labels=("pool", "result"),
        )
        tokenizing = self._tokenizing()
        for pool, engine in tokenizing.engines.items() if tokenizing is not None else ():
            assert tokenizing is not None
            counts, cache = tokenizing.counts[pool], engine.cache
            for result, count in counts.prompts.items():
                prompts.add_metric((pool, str(result)), count)
            for right, count in counts.told.items():
                told.add_metric((pool, "same" if right else "other"), count)
            trusted.add_metric((pool,), float(not engine.judge.distrusted))
            if cache is not None:
                held.add_metric((pool,), cache.bytes)
                pieces.add_metric((pool, "found"), cache.found_characters)
                pieces.add_metric((pool, "made"), cache.made_characters)
        yield from (prompts, told, trusted, held, pieces)
