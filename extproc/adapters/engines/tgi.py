"""Text Generation Inference 2 and 3.

Sources: `docs/source/reference/metrics.md`, `backends/v3/src/{queue,backend}.rs` and `router/src/server.rs` (routes) of
huggingface/text-generation-inference. It tells nothing of its KV cache. Its gauges are there from the first request on.
"""

from __future__ import annotations

from typing import Final

from extproc.adapters.engines.table import Figure, Table, first

TGI: Final = Table(
    name="tgi",
    prefix="tgi_",
    running=first("batch_current_size"),
    waiting=first("queue_size"),
    prompt_tokens=(Figure("request_input_length_sum", at_end=True),),
    generated_tokens=(Figure("request_generated_tokens_sum", at_end=True),),
    needs="a first request",
)
