"""Prompts tokenized between client and replica, through the real Envoy; exactness against real engines is in test_vllm_precise.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from extproc.adapters.tokenizing.tokenizing import WRONG
from extproc.sim.backend import Backend as Replica
from tests.adapters.tokenizing.models import TEMPLATE, folder, made
from tests.e2e.stack import MODEL, Stack, chat, replica, stack
from tests.support.waiting import until

pytestmark = pytest.mark.envoy


def prompts(s: Stack) -> Counter[str]:
    """By what became of them."""
    assert s.app._tokenizing is not None
    return s.app._tokenizing.counts["default"].prompts


def told(each: Replica) -> int:
    """KV events that it has published."""
    assert each.publisher is not None
    return each.publisher.sequence


def messages(s: Stack) -> float:
    """Of KV events that were taken in."""
    return s.metric("extproc_kv_messages_total", pool="default")


async def test_predicted_cached_tokens_are_those_that_simulated_replicas_report(tmp_path: Path) -> None:
    rng = Random(1)
    async with replica(kv_events=0, num_blocks=200) as one, replica(kv_events=0, num_blocks=200) as other:
        tokenizer = {"simulated": True, "timeout_s": 5}
        pool = {"replicas": [one.address, other.address], "kv_events": {}, "tokenizer": tokenizer}
        async with stack(tmp_path, pool) as s:
            exact = s.app.router.pools["default"].caches.exact
            await until(lambda: exact.whole == {one.address, other.address})
            sessions = [[{"role": "system", "content": f"Rules {i % 2} " * 40}] for i in range(6)]
            hits = 0
            for _ in range(30):
                said = rng.choice(sessions)
                said.append({"role": "user", "content": "word " * rng.randrange(5, 200)})
                async with s.post({"model": MODEL, "messages": said, "max_tokens": rng.choice([1, 8, 40])}) as response:
                    answer = await response.json()
                said.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
                decision = (await s.ended()).decision
                assert decision.prefix_source == "exact"
                reported = answer["usage"]
                cached = (reported["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]
                predicted = decision.prediction.cached_tokens
                assert (decision.prompt_tokens, predicted) == (reported["prompt_tokens"], cached)
                hits += cached > 0
                await until(lambda: messages(s) == told(one) + told(other))
            assert hits > 15
            assert s.metric("extproc_kv_events_total", pool="default", type="BlockRemoved") > 10
            assert prompts(s)["tokenized"] == 30


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
