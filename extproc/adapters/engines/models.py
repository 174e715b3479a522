"""What an answer of `/v1/models` lists. Pure.

vLLM, SGLang, TGI (2.0 and later), trtllm-serve, Ray Serve LLM and Triton's OpenAI frontend answer it; tritonserver alone does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson


def listed_models(page: bytes) -> tuple[str, ...] | None:
    """Ids in an answer of `/v1/models`, LoRA adapters included, in its order; None where it is no such answer."""
    entries = _entries(page)
    if entries is None:
        return None
    return tuple(dict.fromkeys(i for i in (entry.get("id") for entry in entries) if isinstance(i, str) and i))


def listed_parents(page: bytes) -> dict[str, str]:
    """LoRA adapter -> base model, of those in an answer of `/v1/models` for which it says so (vLLM does, by `parent`)."""
    pairs = ((entry.get("id"), entry.get("parent")) for entry in _entries(page) or ())
    return {name: parent for name, parent in pairs if isinstance(name, str) and isinstance(parent, str) and parent}


def _entries(page: bytes) -> Iterator[dict[str, Any]] | None:
    try:
        answer = orjson.loads(page)
    except orjson.JSONDecodeError:
        return None
    entries = answer.get("data") if isinstance(answer, dict) else None
    return (entry for entry in entries if isinstance(entry, dict)) if isinstance(entries, list) else None
