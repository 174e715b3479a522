"""One body to the prompt as the engine will have it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from extproc.adapters.tokenizing import pieces, prompts
from extproc.adapters.tokenizing.folder import Model, load
from extproc.adapters.tokenizing.prompts import tokenized
from extproc.config import TokenizerConfig
from extproc.core.prefix.exact import token_chain
from extproc.core.types import Api
from extproc.openai.simulated_prompt import chat_prompt, token_ids
from extproc.openai.tokens import CannotTokenize, Question, Tokenized, Untokenized
from tests.adapters.tokenizing.models import TEMPLATE, folder, made

WHOLE = made("byte level")
CHAT, COMPLETION = Question(Api.CHAT), Question(Api.COMPLETIONS)
[START] = WHOLE.encode("<s>").ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = folder(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)
    return load(TokenizerConfig(path=path), datetime.now)


def of(model: Model, question: Question, body: Any) -> Tokenized:
    return tokenized(model, question, body if isinstance(body, bytes) else json.dumps(body).encode(), unit=1)


def ids(text: str) -> list[int]:
    found: list[int] = WHOLE.encode(text, add_special_tokens=False).ids
    return found


def expected(tokens: list[int], **seed: Any) -> Tokenized:
    return Tokenized(token_chain(tokens, 1, **seed), len(tokens))


def chat(*said: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": each} for each in said], **more}


def test_a_chat(model: Model) -> None:
    text = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"
    assert of(model, CHAT, chat("Hello")) == expected(ids(text))
    assert of(model, CHAT, chat("Hello", add_special_tokens=True)) == expected([START, *ids(text)])


def test_a_completion(model: Model) -> None:
    assert of(model, COMPLETION, {"prompt": "Hello"}) == expected([START, *ids("Hello")])
    assert of(model, COMPLETION, {"prompt": "Hello", "add_special_tokens": False}) == expected(ids("Hello"))
    assert of(model, COMPLETION, {"prompt": [7, 8, 9]}) == expected([7, 8, 9])


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": [7, 8, 9], "truncate_prompt_tokens": 2}, [8, 9]),
        ({"prompt": [7, 8, 9], "truncate_prompt_tokens": 2, "truncation_side": "right"}, [7, 8]),
        ({"prompt": [7, 8, 9], "truncate_prompt_tokens": 5}, [7, 8, 9]),
        ({"prompt": "the fox", "truncate_prompt_tokens": 2}, [START, *ids("the fox")[-1:]]),
        ({"prompt": "the fox", "truncate_prompt_tokens": 2, "truncation_side": "left"}, [START, *ids("the fox")][-2:]),
        ({"prompt": "the fox", "truncate_prompt_tokens": 2, "truncation_side": "right"}, [START, *ids("the fox")][:2]),
    ],
)
def test_prompts_are_cut_as_the_engine_does(model: Model, body: dict[str, Any], tokens: list[int]) -> None:
    assert of(model, COMPLETION, body) == expected(tokens)


def test_adapter_and_salt_are_in_every_hash(model: Model) -> None:
    body = {"prompt": [7, 8]}
    salted = {**body, "cache_salt": "client's"}
    assert of(model, Question(Api.COMPLETIONS, lora="a"), body) == expected([7, 8], lora="a")
    assert of(model, COMPLETION, salted) == expected([7, 8], salt="client's")
    ours = Question(Api.COMPLETIONS, salt="ours")
    assert of(model, ours, body) == of(model, ours, salted) == expected([7, 8], salt="ours")


def test_what_reads_no_cache_finds_nothing(model: Model) -> None:
    found = of(model, COMPLETION, {"prompt": [7, 8], "prompt_logprobs": 1})
    assert (found.blocks.hashes, found.prompt_tokens) == ((), 2)


@pytest.mark.parametrize(
    ("question", "body", "why"),
    [
        (Question(Api.RESPONSES), {"input": "x"}, Untokenized.API),
        (COMPLETION, b"{", Untokenized.REFUSED),
        (COMPLETION, b"[]", Untokenized.REFUSED),
        (COMPLETION, b'{"prompt": "\\ud800"}', Untokenized.REFUSED),
        (COMPLETION, {"prompt": [1 << 40]}, Untokenized.REFUSED),
        (COMPLETION, {"prompt": "x", "truncate_prompt_tokens": 1}, Untokenized.FIELD),
        (CHAT, b"[" * 100_000, Untokenized.REFUSED),
    ],
)
def test_what_cannot_be_tokenized(model: Model, question: Question, body: Any, why: Untokenized) -> None:
    with pytest.raises(CannotTokenize) as e:
        of(model, question, body)
    assert e.value.why is why


def test_bodies_and_texts_are_bounded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_TEXT", 10)
    with pytest.raises(CannotTokenize, match="large"):
        of(model, COMPLETION, {"prompt": "x" * 11})
    monkeypatch.setattr(pieces, "MAX_PIECE", 8)
    with pytest.raises(CannotTokenize, match="large"):
        of(model, COMPLETION, {"prompt": "x" * 9})
    monkeypatch.setattr(prompts, "MAX_BODY_BYTES", 20)
    with pytest.raises(CannotTokenize, match="large"):
        of(model, COMPLETION, {"prompt": "x" * 10})


@pytest.mark.parametrize(
    ("question", "body", "tokens"),
    [
        (COMPLETION, {"prompt": "abcdefg"}, b"abcdefg\0"),
        (COMPLETION, {"prompt": ["abcd"], "truncate_prompt_tokens": 1, "prompt_logprobs": 1}, b"abcd"),
        (COMPLETION, {"prompt": [7, 1 << 32]}, b"\7\0\0\0\0\0\0\0"),
        (CHAT, chat("Hi"), chat_prompt([{"role": "user", "content": "Hi"}])),
        (CHAT, chat("Hi", tools=[{"a": 1}]), chat_prompt([{"role": "user", "content": "Hi"}], [{"a": 1}])),
    ],
)
def test_a_simulated_replica_has_tokens_of_four_bytes(question: Question, body: Any, tokens: bytes) -> None:
    found = tokenized(None, question, json.dumps(body).encode(), unit=1)
    assert found == Tokenized(token_chain(token_ids(tokens), 1), len(tokens) // 4)


@pytest.mark.parametrize(
    ("question", "body", "why"),
    [
        (Question(Api.EMBEDDINGS), {"input": "x"}, Untokenized.API),
        (COMPLETION, {"prompt": ["a", "b"]}, Untokenized.PROMPTS),
        (CHAT, {"messages": "x"}, Untokenized.REFUSED),
        (CHAT, {"messages": ["x"]}, Untokenized.REFUSED),
    ],
)
def test_what_a_simulated_replica_is_not_asked(question: Question, body: Any, why: Untokenized) -> None:
    with pytest.raises(CannotTokenize) as e:
        tokenized(None, question, json.dumps(body).encode())
    assert e.value.why is why
