"""Ray Serve LLM: vLLM whose metrics go through Ray, which cleans their names (`:` becomes `_`, but not in releases before about 2.48)
and adds its own prefix and labels.

Each node of a Ray cluster exports what runs on it, on a port of its own, while requests go to the one endpoint of Serve: where the
pages are is said by `scrape.port` or by the label `metrics` of the replica. vLLM that uses Ray only to spread one engine over
nodes (`--distributed-executor-backend ray`) serves a page of its own under its own names, and is `vllm`.

Sources: `vllm/v1/metrics/ray_wrappers.py` of vllm-project/vllm (names, `ReplicaId`); docs.ray.io, "Collecting and monitoring metrics"
and "Observability" of Serve LLM; queries of Ray's own dashboard, which use the names with `_total`. Zero counters are not exported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from extproc.adapters.engines.table import HealthPaths, first
from extproc.adapters.engines.vllm import VLLM

RAY: Final = replace(
    VLLM,
    name="ray",
    prefix="ray_vllm[:_]",
    num_blocks=first("cache_config_info[num_gpu_blocks]"),
    # Releases differ in whether a counter ends in _total.
    prompt_tokens=first("prompt_tokens_total", "prompt_tokens"),
    generated_tokens=first("generation_tokens_total", "generation_tokens"),
    prefix_queries=first("prefix_cache_queries_total", "prefix_cache_queries"),
    prefix_hits=first("prefix_cache_hits_total", "prefix_cache_hits"),
    preemptions=first("num_preemptions_total", "num_preemptions"),
    rank=None,  # replicas of Serve lie behind the endpoint as well, each with its own ranks, and a header reaches neither
    health=(HealthPaths("/-/healthz"),),
    needs="scrape.port: 8080, or the label metrics of its replica for several nodes",
)
