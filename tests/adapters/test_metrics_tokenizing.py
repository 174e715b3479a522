"""What became of prompts, in the metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry

from extproc.adapters.metrics_tokenizing import TokenizingCollector, TokenizingMetrics
from extproc.adapters.tokenizing.tokenizing import WRONG, Tokenizing
from extproc.config import TokenizerConfig
from extproc.core.types import Api
from extproc.openai.tokens import Place, Question
from tests.adapters.tokenizing.models import TEMPLATE, folder
from tests.core.catalog.support import at, chat, placed, pools
from tests.core.support import ok, text, usage


class Bench:
    def __init__(self, path: Path) -> None:
        self.registry = CollectorRegistry()
        self.metrics = TokenizingMetrics(self.registry, lambda: self.tokenizing)
        self.registry.register(TokenizingCollector(lambda: self.tokenizing))
        settings = TokenizerConfig(path=folder(path, chat_template=TEMPLATE), timeout_s=5.0)
        self.tokenizing: Tokenizing | None = Tokenizing({"a": settings}, datetime.now, took=self.metrics.took)
        self.router = pools("a", observer=self.metrics)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"extproc_{name}", {"pool": "a", **labels})

    def end(self, reported: int | None, tokenized: bool = True) -> None:
        """Of a request with 2000 tokens in its prompt."""
        wanted = replace(chat(text(400)), model="m", prompt_tokens=2000, tokenized=tokenized)
        told = None if reported is None else usage(reported)
        self.router.finish(placed(self.router, wanted).flight, ok(at("a"), usage=told), 1.0)


async def test_prompts_by_what_became_of_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert bench.tokenizing is not None
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
    for _ in range(2):
        assert await bench.tokenizing.tokens([Place("a")], Question(Api.CHAT), body)
    assert await bench.tokenizing.tokens([Place("a")], Question(Api.RESPONSES), body) is None
    bench.tokenizing.close()
    assert bench.value("tokenized_prompts_total", result="tokenized") == 2
    assert bench.value("tokenized_prompts_total", result="api") == 1
    assert bench.value("tokenizing_seconds_count") == 3
    assert bench.value("tokenizer_characters_total", result="found") == bench.value(
        "tokenizer_characters_total", result="made"
    )
    assert bench.value("tokenizer_cache_bytes")


def test_what_the_engine_counts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.end(2000)
    bench.end(None)
    bench.end(7, tokenized=False)
    assert bench.value("prompt_tokens_told_total", result="same") == 1
    assert bench.value("prompt_tokens_told_total", result="other") == 0
    assert bench.value("tokenizer_trusted") == 1
    for _ in range(WRONG):
        bench.end(1999)
    assert bench.value("prompt_tokens_told_total", result="other") == WRONG
    assert bench.value("tokenizer_trusted") == 0


def test_nothing_without_a_tokenizer(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.tokenizing = None
    bench.end(7)
    assert bench.value("tokenizer_trusted") is None
