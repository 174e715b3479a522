"""A decision record as people read it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from extproc.explain import table

RECORD: dict[str, Any] = {
    "api": "chat",
    "model": "m",
    "pool": "p",
    "prompt_tokens": 40,
    "output_tokens": 12.0,
    "output_p90_tokens": 30,
    "policy": "predicted",
    "reason": "prefix",
    "endpoints": ["10.0.0.1:1"],
    "predicted": {"cached_tokens": 32, "prefix_source": "exact", "ttft_s": 0.0123},
    "prefiller": None,
    "tokens": None,
    "candidates": [{"replica": "10.0.0.1:1", "score": 0.5, "terms": {"queue_s": None, "cached_tokens": 32.0}}],
}


def shown(**changes: Any) -> str:
    text = io.StringIO()
    table({**RECORD, **changes}, Console(file=text, width=140))
    return text.getvalue()


def test_a_decision() -> None:
    text = shown()
    assert "chat for m in pool p: 40 prompt tokens, about 12 output tokens (p90 30)" in text
    assert "10.0.0.1:1, 32 tokens cached (exact), first token in 12 ms" in text
    assert "unknown" in text


@pytest.mark.parametrize(("tokens", "told"), [(None, False), ("tokenized", False), ("late", True)])
def test_a_prompt_without_tokens_says_why(tokens: str | None, told: bool) -> None:
    assert ("the prompt was not tokenized (late): what is cached is guessed" in shown(tokens=tokens)) is told
