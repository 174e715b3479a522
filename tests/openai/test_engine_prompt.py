"""Prompts as vLLM makes them, against recorded ones; and what is not understood."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from extproc.openai.chat_template import ChatTemplate, ContentFormat
from extproc.openai.engine_prompt import (
    MAX_MESSAGES,
    Cut,
    Ids,
    Templates,
    Text,
    of_chat,
    of_completion,
    reads_no_cache,
)
from extproc.openai.tokens import CannotTokenize, Untokenized

FIXTURES = Path(__file__).parent.parent / "fixtures" / "chat_prompts"
SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
SOURCES: dict[str, str] = json.loads((FIXTURES / "templates.json").read_text())
CASES = [json.loads(line) for line in (FIXTURES / "vllm-0.32.jsonl").read_text().splitlines()]
USER = [{"role": "user", "content": "Hi"}]
LINES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
NOON = datetime(2026, 5, 4, 12)


def templates(source: str = LINES, **more: Any) -> Templates:
    found = ChatTemplate(source, lambda: NOON)
    return Templates(lambda _tools: found, SPECIAL, **more)


def why(body: dict[str, Any], source: str = LINES) -> Untokenized:
    with pytest.raises(CannotTokenize) as e:
        of_chat(body, templates(source))
    return e.value.why


@pytest.mark.parametrize("name", SOURCES)
def test_chats_become_the_prompts_that_vllm_makes(name: str) -> None:
    made = templates(SOURCES[name])
    for case in CASES:
        expected = case["prompts"][name]
        if expected is None:
            with pytest.raises(CannotTokenize):
                of_chat(case["body"], made)
        else:
            assert of_chat(case["body"], made).text == expected, case["body"]


def test_the_recording_has_what_matters() -> None:
    text = json.dumps([case["body"] for case in CASES])
    for each in ("tool_calls", "reasoning_effort", "continue_final_message", "documents", "developer", "billing"):
        assert each in text
    assert sum(prompt is None for case in CASES for prompt in case["prompts"].values()) > 5


def test_a_body_is_not_changed() -> None:
    for case in CASES:
        body = json.loads(json.dumps(case["body"]))
        of_chat(body, templates())
        assert body == case["body"]


def test_no_special_tokens_are_added_to_chats_unless_asked_for() -> None:
    assert of_chat({"messages": USER}, templates()) == Text("user: Hi\nassistant:")
    assert of_chat({"messages": USER, "add_special_tokens": True}, templates()).special


def test_values_of_the_engine_stand_where_the_request_is_silent() -> None:
    made = templates("{{ tone }} {{ messages[0].content }}", values={"tone": "kind"})
    assert of_chat({"messages": USER}, made).text == "kind Hi"
    assert of_chat({"messages": USER, "chat_template_kwargs": {"tone": "dry"}}, made).text == "dry Hi"
    assert of_chat({"messages": USER, "chat_template_kwargs": {"tone": None}}, made).text == "kind Hi"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "-"),
        ({"reasoning_effort": "high"}, "True high"),
        ({"reasoning_effort": "none"}, "False none"),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}, "False high"),
    ],
)
def test_an_effort_turns_thinking_on_unless_that_is_told(more: dict[str, Any], expected: str) -> None:
    source = "{% if enable_thinking is defined %}{{ enable_thinking }} {{ reasoning_effort }}{% else %}-{% endif %}"
    assert of_chat({"messages": USER, **more}, templates(source)).text == expected


def test_the_content_format_may_be_told() -> None:
    source = "{{ messages[0].content }}"
    assert of_chat({"messages": USER}, templates(source)).text == "Hi"
    assert of_chat({"messages": USER}, templates(source, content_format=ContentFormat.OPENAI)).text.startswith("[{")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"chat_template": "x"}, Untokenized.TEMPLATE),
        ({"chat_template_kwargs": {"tokenize": True}}, Untokenized.TEMPLATE),
        ({"chat_template_kwargs": 3}, Untokenized.TEMPLATE),
        ({"kv_transfer_params": {"prompt_token_ids": [1]}}, Untokenized.FIELD),
        ({"truncate_prompt_tokens": -1}, Untokenized.FIELD),
        ({"truncation_side": "middle", "truncate_prompt_tokens": 3}, Untokenized.FIELD),
        ({"add_generation_prompt": "yes"}, Untokenized.FIELD),
        ({"continue_final_message": True}, Untokenized.REFUSED),
        ({"tools": []}, Untokenized.REFUSED),
        ({"tools": [{"type": "function"}]}, Untokenized.REFUSED),
        ({"messages": []}, Untokenized.REFUSED),
        ({"messages": [{"content": "no role"}]}, Untokenized.REFUSED),
        ({"messages": [{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1)}, Untokenized.LARGE),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, Untokenized.MEDIA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}]}, Untokenized.MEDIA),
        ({"messages": [{"role": "user", "content": [{"text": "no type"}]}]}, Untokenized.MEDIA),
        ({"messages": [{"role": "user", "content": 3}]}, Untokenized.REFUSED),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, Untokenized.REFUSED),
    ],
)
def test_what_is_not_understood_is_said(more: dict[str, Any], expected: Untokenized) -> None:
    assert why({"messages": USER, **more}) is expected


def test_a_model_without_a_template() -> None:
    with pytest.raises(CannotTokenize, match="template"):
        of_chat({"messages": USER}, Templates(lambda _tools: None))


def test_the_template_for_tools_is_asked_for_with_tools() -> None:
    plain, tooled = (ChatTemplate(text, lambda: NOON) for text in ("plain", "{{ tools[0].function.name }}"))
    both = Templates(lambda tools: tooled if tools else plain)
    assert of_chat({"messages": USER}, both).text == "plain"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert of_chat({"messages": USER, "tools": tools}, both).text == "f"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "Hi"}, Text("Hi", special=True)),
        ({"prompt": ["Hi"]}, Text("Hi", special=True)),
        ({"prompt": "Hi", "add_special_tokens": False}, Text("Hi")),
        ({"prompt": [3, 4]}, Ids([3, 4])),
        ({"prompt": [[3, 4]]}, Ids([3, 4])),
        ({"prompt": "Hi", "truncate_prompt_tokens": 2}, Text("Hi", special=True, cut=Cut(2))),
        ({"prompt": [3], "truncate_prompt_tokens": 2, "truncation_side": "right"}, Ids([3], Cut(2, "right"))),
    ],
)
def test_completions(body: dict[str, Any], expected: Text | Ids) -> None:
    assert of_completion(body) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": ["a", "b"]}, Untokenized.PROMPTS),
        ({"prompt": [[1], [2]]}, Untokenized.PROMPTS),
        ({"prompt": []}, Untokenized.PROMPTS),
        ({"prompt": [True]}, Untokenized.PROMPTS),
        ({"prompt": [-1]}, Untokenized.PROMPTS),
        ({"prompt": None}, Untokenized.PROMPTS),
        ({"prompt": "x", "prompt_embeds": "AA"}, Untokenized.MEDIA),
        ({"prompt": "x", "suffix": "y"}, Untokenized.FIELD),
    ],
)
def test_completions_that_are_not_understood(body: dict[str, Any], expected: Untokenized) -> None:
    with pytest.raises(CannotTokenize) as e:
        of_completion(body)
    assert e.value.why is expected


def test_log_probabilities_of_the_prompt_read_no_cache() -> None:
    assert reads_no_cache({"prompt_logprobs": 0})
    assert reads_no_cache({"prompt": "x", "echo": True, "logprobs": 1})
    assert not reads_no_cache({"prompt": "x", "echo": True})
    assert not reads_no_cache({"messages": [], "echo": True, "logprobs": True})
