"""Triton Inference Server, with its TensorRT-LLM backend and with any other. Its vLLM backend speaks as `vllm`.

Sources: `docs/user_guide/metrics.md` and `python/openai/openai_frontend/frontend/fastapi/routers/observability.py` of
triton-inference-server/server; `triton_backend/inflight_batcher_llm/src/custom_metrics_reporter/custom_metrics_reporter.cc` of
NVIDIA/TensorRT-LLM; `README.md` of triton-inference-server/tensorrtllm_backend (a page).
The OpenAI frontend serves the page on its own port; `tritonserver` alone on another (8002).
"""

from __future__ import annotations

from typing import Final

from extproc.adapters.engines.table import HealthPaths, Table, first

_HEALTH: Final = (HealthPaths("/v2/health/live", "/v2/health/ready"), HealthPaths("/health/ready"))
"""The first of tritonserver; the second of its OpenAI frontend, which answers 400 while it is not ready."""


def _requests(kind: str) -> str:
    return f'request_metrics{{request_type="{kind}"}}'


def _blocks(kind: str) -> str:
    return f'kv_cache_block_metrics{{kv_cache_block_type="{kind}"}}'


TRITON_TENSORRT_LLM: Final = Table(
    name="triton_trtllm",
    prefix="nv_trt_llm_",
    running=first(_requests("scheduled")),
    waiting=first(_requests("waiting")),
    kv_usage=first(_blocks("fraction")),
    block_size=first(_blocks("tokens_per")),
    num_blocks=first(_blocks("max")),
    health=_HEALTH,
)

TRITON: Final = Table(
    name="triton",
    prefix="nv_inference_",
    waiting=first("pending_request_count"),
    health=_HEALTH,
    needs="scrape.port: 8002 where it is not its OpenAI frontend",
)
"""Pending requests are all that plain Triton tells of its load now; its other series count what is over."""
