"""Prompts tokenized between client and replica, through the real Envoy; exactness against real engines is in test_vllm_precise.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from extproc.adapters.tokenizing.tokenizing import WRONG
from tests.adapters.tokenizing.models import TEMPLATE, folder, made
from tests.e2e.stack import Stack, chat, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


def prompts(s: Stack) -> Counter[str]:
    """By what became of them."""
    assert s.app._tokenizing is not None
    return s.app._tokenizing.counts["default"].prompts


async def test_the_decision_knows_the_tokens_until_the_engine_disagrees(tmp_path: Path) -> None:
    path = folder(tmp_path / "model", chat_template=TEMPLATE)
    async with replica() as backend:
        pool = {"replicas": [backend.address], "tokenizer": {"path": str(path), "timeout_s": 5}}
        async with stack(tmp_path, pool) as s:
            await s.served(chat("Hello"))
            text = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"
            assert s.last().decision.prompt_tokens == len(made("byte level").encode(text).ids)
            # The simulated replica counts tokens by a rule of its own.
            for i in range(WRONG):
                await s.served(chat(f"Hello {i}"))
            await until(lambda: all(each.ended for each in s.app.recorder.last(WRONG + 1)))
            await s.served(chat("Hello"))
            counts = prompts(s)
            assert (counts["tokenized"], counts["distrusted"]) == (WRONG + 1, 1)


async def test_a_late_tokenizer_delays_nobody_and_is_seen(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "model", chat_template="{% for i in range(100000) %}{% for j in range(3) %}{% endfor %}{% endfor %}"
    )
    async with replica() as backend:
        pool = {"replicas": [backend.address], "tokenizer": {"path": str(path), "timeout_s": 0.001}}
        async with stack(tmp_path, pool) as s:
            await s.served(chat("Hello"))
            assert prompts(s)["late"] == 1
            assert s.last().decision.prediction.cached_tokens == 0
