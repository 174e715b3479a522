"""Canonical prompts: what must be equal, what must be a prefix, what must differ."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.openai.prompt import (
    MAX_MEDIA,
    MEDIA_BYTES,
    Prompt,
    of_chat,
    of_embeds,
    of_input,
    of_responses,
    seed,
    words,
)

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 50_000}}

any_text = st.text(alphabet=st.characters(), max_size=30)  # lone surrogates included
texts = st.text(max_size=30)
parts = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, any_text),
    st.builds(lambda t: {"type": "image_url", "image_url": {"url": t}}, texts),
    any_text,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "critic"])},
    optional={
        "content": st.one_of(st.none(), any_text, st.lists(parts, max_size=3)),
        "tool_calls": st.just([CALL]),
        "name": texts,
        "tool_call_id": texts,
        "reasoning": texts,
    },
)
conversations = st.lists(messages, max_size=5)
tools = st.sampled_from([None, [], [TOOL], [TOOL, TOOL]])


@given(past=conversations, turn=conversations, known=tools)
def test_a_conversation_that_grows_keeps_its_prefix(
    past: list[dict[str, Any]], turn: list[dict[str, Any]], known: Any
) -> None:
    before, after = of_chat(past, known).canonical, of_chat(past + turn, known).canonical
    assert after.startswith(before)
    assert (before == after) == (not turn)


@given(head=texts, one=texts, other=texts)
def test_text_shared_within_a_message_is_shared_in_the_prompt(head: str, one: str, other: str) -> None:
    a, b = (of_chat([{"role": "user", "content": head + tail}]).canonical for tail in (one, other))
    shared = of_chat([{"role": "user", "content": head}]).canonical
    assert a.startswith(shared)
    assert b.startswith(shared)


def test_tools_come_before_messages() -> None:
    asked = [{"role": "user", "content": "hello"}]
    assert of_chat(asked, [TOOL]).canonical.endswith(of_chat(asked).canonical)
    assert of_chat(asked, [TOOL]).canonical.startswith(of_chat([], [TOOL]).canonical)


def test_all_that_a_template_reads_of_a_message_counts() -> None:
    said = {"role": "assistant", "content": "a"}
    variants: list[dict[str, Any]] = [
        said,
        {**said, "role": "user"},
        {**said, "content": "b"},
        {**said, "content": None},
        {**said, "tool_calls": [CALL]},
        {**said, "tool_calls": [{**CALL, "id": "c2"}]},
        {**said, "name": "n"},
        {**said, "tool_call_id": "n"},
        {**said, "reasoning": "n"},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    assert len({of_chat([variant]).canonical for variant in variants}) == len(variants)


def test_text_cannot_imitate_the_start_of_a_message() -> None:
    one = of_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]).canonical
    separator = one[one.index(b"a") + 1 : one.index(b"b")]
    for imitation in (separator.decode("latin-1"), separator.decode("utf-8", "surrogateescape")):
        assert of_chat([{"role": "user", "content": f"a{imitation}b"}]).canonical != one


def test_one_text_part_equals_plain_text() -> None:
    plain = of_chat([{"role": "user", "content": "hello"}])
    assert of_chat([{"role": "user", "content": [{"type": "text", "text": "hello"}]}]) == plain


def test_fields_that_are_null_or_empty_equal_fields_that_are_absent() -> None:
    bare = of_chat([{"role": "assistant", "content": "a"}], None)
    assert of_chat([{"role": "assistant", "content": "a", "tool_calls": [], "name": None}], []) == bare


def test_key_order_does_not_matter() -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: backwards(value[key]) for key in reversed(value)}
        return [backwards(v) for v in value] if isinstance(value, list) else value

    talk = [{"role": "assistant", "content": [IMAGE], "tool_calls": [CALL]}]
    assert of_chat(backwards(talk), backwards([TOOL])) == of_chat(talk, [TOOL])


# --- media ------------------------------------------------------------------------------------------------------------


def test_an_image_weighs_the_same_whatever_its_bytes() -> None:
    small = {"type": "image_url", "image_url": {"url": "http://example.test/a.png"}}
    empty, one, other = (of_chat([{"role": "user", "content": parts}]) for parts in ([], [IMAGE], [small]))
    assert one.size == other.size == empty.size + MEDIA_BYTES
    assert one.canonical != other.canonical


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://example.test/v.mp4"}},
        {"type": "something_new", "payload": [1, 2]},
        {"type": "text", "text": None},
        17,
        None,
    ],
)
def test_every_other_part_is_taken_by_its_hash(part: Any) -> None:
    assert of_chat([{"role": "user", "content": [part]}]).size == of_chat([{"role": "user"}]).size + MEDIA_BYTES


@pytest.mark.parametrize("kind", ["text", "refusal", "thinking"])
def test_parts_of_text_are_taken_as_text(kind: str) -> None:
    assert of_chat([{"role": "user", "content": [{"type": kind, kind: "hello"}]}]).canonical.endswith(b"hello")


def test_media_cannot_blow_a_prompt_up() -> None:
    prompt = of_chat([{"role": "user", "content": [{"type": "image_url"}] * 10_000}])
    assert prompt.size < MAX_MEDIA * MEDIA_BYTES + 10_000 * 16


def test_a_flood_of_messages_or_parts_is_hashed_as_one() -> None:
    turn = {"role": "user", "content": "a"}
    flood, other = [turn] * 100_000, [turn] * 99_999 + [{"role": "user", "content": "b"}]
    assert of_chat(flood).canonical != of_chat(other).canonical
    assert of_chat(flood).canonical.startswith(of_chat([turn] * 5000).canonical)
    assert of_chat([{"role": "user", "content": flood}]).size < 100_000 + MAX_MEDIA * MEDIA_BYTES


# --- the other three APIs ---------------------------------------------------------------------------------------------


def test_text_is_its_own_canonical_prompt() -> None:
    assert of_input("hé") == Prompt(b"h\xc3\xa9", 3)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_token_ids_are_counted_and_packed(ids: list[int]) -> None:
    assert of_input(ids) == Prompt(struct.pack(f"<{len(ids)}I", *ids), 4 * len(ids), tokens=len(ids))


def test_of_several_prompts_the_first_is_looked_up_and_all_are_weighed() -> None:
    assert of_input(["abc", "de"]) == Prompt(b"abc", 5, tokens=None, count=2)
    assert of_input([[1, 2, 3], [4]]) == Prompt(b"\1\0\0\0\2\0\0\0\3\0\0\0", 16, tokens=4, count=2)


@pytest.mark.parametrize("odd", [[1, "a"], [-1], [2**32], [1.5], [None], [{"a": 1}], ["a", 1], [[1], "a"], [["a"]]])
def test_odd_lists_are_left_to_the_engine(odd: list[Any]) -> None:
    prompt = of_input(odd)
    assert prompt.size > 0
    assert prompt.tokens is None


def test_embeddings_of_a_prompt_weigh_as_one_medium() -> None:
    assert of_embeds("QUFB" * 10_000).size == of_embeds(["x"]).size == MEDIA_BYTES
    assert of_embeds("QUFB") != of_embeds("QUFC")


def test_responses_and_chat_agree_on_the_same_conversation() -> None:
    chat = of_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}], [TOOL])
    assert of_responses("be brief", "hello", [TOOL]) == chat
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
    assert of_responses("be brief", [item], [TOOL]) == chat


def test_items_of_responses_keep_the_prefix() -> None:
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
        {"type": "function_call_output", "call_id": "c", "output": [IMAGE]},
        {"type": "computer_call_output", "call_id": "c", "output": IMAGE},
    ]
    grown = [of_responses(None, items[:i]).canonical for i in range(len(items) + 1)]
    for before, after in pairwise(grown):
        assert after.startswith(before)
        assert before != after
    assert len(grown[-1]) < 3 * MEDIA_BYTES


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_model_and_salt_are_kept_apart() -> None:
    seeds = [seed("a", None), seed("a", "b"), seed("ab", None), seed("", "ab"), seed("b", "a")]
    assert len(set(seeds)) == len(seeds)


@given(model=any_text, salt=any_text)
def test_any_name_and_salt_can_be_hashed(model: str, salt: str) -> None:
    assert seed(model, salt)


# --- oddities of JSON -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ['{"a": "\\ud800"}', '{"a": 123456789012345678901234567890}', '{"a": NaN}', "[" * 400 + "]" * 400]
)
def test_tools_that_orjson_will_not_write_are_still_told_apart(odd: str) -> None:
    one = of_chat([], [json.loads(odd)])
    assert one == of_chat([], [json.loads(odd)])
    assert one != of_chat([], [TOOL])


def test_tools_nested_beyond_reason_raise_nothing() -> None:
    deep: Any = None
    for _ in range(50_000):
        deep = [deep]
    assert of_chat([], [deep]).size > 0


# --- words --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (of_input("one two\nthree\tfour"), 4),
        (of_input(""), 0),
        (of_chat([{"role": "system", "content": "one"}, {"role": "user", "content": "two three"}]), 3),
        (
            of_chat([{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]),
            2,
        ),
        (of_chat([{"role": "tool", "tool_call_id": "x", "content": "one two"}]), 3),
        (of_responses("one", "two three"), 3),
        (of_input([1, 2, 3]), None),
        (of_input(["one", "two"]), None),
        (of_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), None),
    ],
)
def test_words_are_those_of_one_text(made: Prompt, count: int | None) -> None:
    assert words(made) == count
