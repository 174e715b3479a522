"""SGLang 0.4 to 0.5.

Sources: `python/sglang/srt/observability/metrics_collector.py` of sgl-project/sglang (formerly `srt/metrics/collector.py`), and its
`docs/references/production_metrics.md`. `/health` and `/health_generate`: `python/sglang/srt/entrypoints/http_server.py`.
"""

from __future__ import annotations

from typing import Final

from extproc.adapters.engines.table import Figure, Figures, Table, first

_LIVE: Final = b"\nsglang:realtime_tokens_total{"
"""Newer versions count tokens while they are computed, at each log interval; the other counters move when a request ends."""


def _tokens(live: str, at_end: str, *more: str) -> Figures:
    name = "realtime_tokens_total"
    plus = tuple(f'{name}{{mode="{mode}"}}' for mode in more)
    return Figure(f'{name}{{mode="{live}"}}', plus, only_with=_LIVE), Figure(at_end, at_end=True)


SGLANG: Final = Table(
    name="sglang",
    prefix="sglang:",
    running=first("num_running_reqs"),
    # With prefill and decode apart, requests also wait for a partner, for room, and for their KV cache to arrive.
    waiting=(
        Figure(
            "num_queue_reqs",
            plus=(
                "num_grammar_queue_reqs",
                "num_prefill_bootstrap_queue_reqs",
                "num_prefill_prealloc_queue_reqs",  # its older name
                "num_decode_prealloc_queue_reqs",
                "num_decode_transfer_queue_reqs",
            ),
        ),
    ),
    kv_usage=first("token_usage"),
    block_size=first("page_size", "cache_config_info[page_size]"),
    num_blocks=first("num_pages", "cache_config_info[num_pages]"),
    cache_tokens=first("max_total_num_tokens"),
    prompt_tokens=_tokens("prefill_compute", "prompt_tokens_total", "prefill_cache"),
    generated_tokens=_tokens("decode", "generation_tokens_total"),
    prefix_queries=first("prompt_tokens_total"),
    prefix_hits=first("cached_tokens_total"),
    preemptions=first("num_retracted_requests_total"),
    rank="dp_rank",
    copies=(
        "tp_rank",
        "pp_rank",
        "moe_ep_rank",
    ),  # with --enable-metrics-for-all-schedulers each of them tells the same
    skip=r',priority="[^"]',  # with priority scheduling the whole stands under priority="", the parts under their numbers
    needs="--enable-metrics",
)
