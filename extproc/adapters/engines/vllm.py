"""vLLM 0.8 to 0.33, and whatever serves its metrics under its names (Triton's vLLM backend does).

Sources: pages recorded from 0.32 on CPU; `vllm/v1/metrics/loggers.py` of vllm-project/vllm; for the backend of Triton
`src/utils/metrics.py` of triton-inference-server/vllm_backend.
"""

from __future__ import annotations

from typing import Final

from extproc.adapters.engines.table import Figure, Figures, Table, first

_IN_BLOCKS: Final = b"in terms of number of queried blocks"
"""In the help text of the first V1 releases, whose prefix cache counters count blocks under the name that later counted tokens."""


def _prefix_cache(what: str) -> Figures:
    old = f"gpu_prefix_cache_{what}_total"
    return (
        Figure(f"prefix_cache_{what}_total"),
        Figure(old, in_blocks=True, only_with=_IN_BLOCKS),
        Figure(old),
    )


VLLM: Final = Table(
    name="vllm",
    prefix="vllm:",
    running=first("num_requests_running"),
    waiting=first("num_requests_waiting"),
    kv_usage=first("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    block_size=first("cache_config_info[block_size]"),
    num_blocks=(Figure("cache_config_info[num_gpu_blocks]", of_all=True),),  # seen on 0.32: the front end adds them up
    prompt_tokens=first("prompt_tokens_total"),
    generated_tokens=first("generation_tokens_total"),
    prefix_queries=_prefix_cache("queries"),
    prefix_hits=_prefix_cache("hits"),
    preemptions=first("num_preemptions_total"),
    awake=first('engine_sleep_state{sleep_state="awake"}'),
    adapters="lora_requests_info",
    rank="engine",
    needs="to run without --disable-log-stats",
)
