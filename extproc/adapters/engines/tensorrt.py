"""TensorRT-LLM's own server, `trtllm-serve`.

Sources: `tensorrt_llm/metrics/collector.py` (names) and `tensorrt_llm/serve/openai_server.py` (paths) of NVIDIA/TensorRT-LLM.
`/metrics` is a JSON list of iterations there, emptied by whoever reads it, and not read here; the Prometheus page is at
`/prometheus/metrics` and exists only with `return_perf_metrics`. Gauges come from the statistics of iterations, which the server collects
when a request ends, so that they may be as old as the last one that did.
"""

from __future__ import annotations

from typing import Final

from extproc.adapters.engines.table import Figure, Table, first

TENSORRT_LLM: Final = Table(
    name="trtllm",
    prefix="trtllm_",
    running=first("num_requests_running"),
    waiting=first("num_requests_waiting"),
    kv_usage=first("kv_cache_utilization"),
    block_size=first("kv_cache_tokens_per_block"),
    num_blocks=first("kv_cache_max_blocks"),
    prompt_tokens=(Figure("prompt_tokens_total", at_end=True),),
    generated_tokens=(Figure("generation_tokens_total", at_end=True),),
    prefix_queries=(Figure("kv_cache_reused_blocks_total", ("kv_cache_missed_blocks_total",), in_blocks=True),),
    prefix_hits=(Figure("kv_cache_reused_blocks_total", in_blocks=True),),
    path="/prometheus/metrics",
    needs="return_perf_metrics: true and enable_iter_perf_stats: true",
)
