"""Where a body names its model, and what becomes of the body when another name is put there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.openai.body import Change, applied, model_span, pair, rename, salt
from extproc.openai.reading import Task, perform
from extproc.openai.requests import Limits, Parsed, read
from extproc.openai.requests import model_span as span_of

CHAT = "/v1/chat/completions"


def renamed(body: bytes, name: str = "engine") -> bytes:
    span = model_span(body)
    assert span is not None
    return rename(span, name).apply(body)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"a","messages":[]}', b'{"model":"engine","messages":[]}'),
        (b'{"messages":[], "model" : "a" }', b'{"messages":[], "model" : "engine" }'),
        (b'\xef\xbb\xbf{"model":\n"a"}', b'\xef\xbb\xbf{"model":\n"engine"}'),
        (b'{"seed":12345678901234567890123,"a":1.10,"a":NaN,"model":"x"}',
         b'{"seed":12345678901234567890123,"a":1.10,"a":NaN,"model":"engine"}'),
        (b'{"model":"a\\"\\\\","t":1}', b'{"model":"engine","t":1}'),
        (b'{"model":"\\u0061","t":1}', b'{"model":"engine","t":1}'),
        # of doubled keys the last one counts
        (b'{"model":"a","model":"b"}', b'{"model":"a","model":"engine"}'),
        (b'{"model":7,"model":"b"}', b'{"model":7,"model":"engine"}'),
        # deeper ones do not
        (b'{"model":"a","tools":[{"model":"n"}]}', b'{"model":"engine","tools":[{"model":"n"}]}'),
        (b'{"tools":[{"model":"n"}],"model":"a"}', b'{"tools":[{"model":"n"}],"model":"engine"}'),
        (b'{"tools":[{"a":{"model":{"type":"string"}}}],"model":"a"}',
         b'{"tools":[{"a":{"model":{"type":"string"}}}],"model":"engine"}'),
        (b'{"x":["model",{"model":"n"}],"model":"a","y":"model"}', b'{"x":["model",{"model":"n"}],"model":"engine","y":"model"}'),
        # nor what only looks like it
        (b'{"user":"\\"model\\":\\"n\\"","model":"a"}', b'{"user":"\\"model\\":\\"n\\"","model":"engine"}'),
        (b'{"user":"}{[\\\\","model":"a","z":{"model":"n"}}', b'{"user":"}{[\\\\","model":"engine","z":{"model":"n"}}'),
        (b'{"\\"model":"n","model":"a"}', b'{"\\"model":"n","model":"engine"}'),
        # however it is spelled
        (b'{"mod\\u0065l":"a"}', b'{"mod\\u0065l":"engine"}'),
        (b'{"\\u006D\\u006Fd\\u0065\\u006C":"a","x":{"model":"n"}}', b'{"\\u006D\\u006Fd\\u0065\\u006C":"engine","x":{"model":"n"}}'),
        (b'{"model":"a","mod\\u0065l":"b"}', b'{"model":"a","mod\\u0065l":"engine"}'),
    ],
)  # fmt: skip
def test_the_name_is_replaced_and_nothing_else(before: bytes, after: bytes) -> None:
    assert renamed(before) == after


@given(
    st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5), min_size=1),
    st.sampled_from(["10.0.0.1", "[2001:db8::1]"]),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["", " ", "\n\t"]),
)
def test_where_two_engines_meet_is_all_that_is_added(body: dict[str, Any], host: str, room: int, space: str) -> None:
    written = (json.dumps(body, ensure_ascii=False) + space).encode(errors="surrogatepass")
    changed = json.loads(pair(written, host, 8_998, room).apply(written).decode(errors="surrogatepass"))
    assert changed == {**body, "bootstrap_host": host, "bootstrap_port": 8_998, "bootstrap_room": room}


def test_a_body_that_does_not_name_its_model_is_left_alone() -> None:
    assert model_span(b'{"x":{"model":"a"},"y":{"model":"a"}}') is None
    assert model_span(b'{"messages":[]}') is None
    assert span_of(Parsed(read("GET", "/x", None).request), b"") is None  # type: ignore[union-attr]


def test_any_name_is_spelled_so_that_it_reads_back() -> None:
    for name in ('quo"te', "back\\slash", "line\nfeed", "größe/模型"):
        assert json.loads(renamed(b'{"model":"a"}', name)) == {"model": name}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["model", '"model":"x"', "}{]["]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model", "a", "mo", '"']), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(
    st.dictionaries(st.sampled_from(["a", "tools", "messages", "models"]), json_values),
    st.dictionaries(st.sampled_from(["b", "user", "mode"]), json_values),
    st.text(min_size=1, max_size=10),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_of_any_body_only_the_name_changes(
    before: dict[str, Any], after: dict[str, Any], name: str, ascii_only: bool, indent: int | None
) -> None:
    given_body = {**before, "model": name, **after}
    body = json.dumps(given_body, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    changed = renamed(body)
    assert json.loads(changed) == {**given_body, "model": "engine"}
    assert list(json.loads(changed)) == list(given_body)
    span = model_span(body)
    assert span is not None
    assert body[: span[0]] == changed[: span[0]]
    assert body[span[1] :] == changed[span[0] + len(b'"engine"') :]


def test_changes_are_made_in_one_pass_each_where_it_belongs() -> None:
    body = b'{"model":"a","stream":true}'
    end = body.rindex(b"}")
    changes = [Change(end, end, b',"x":1'), rename((9, 12), "engine"), salt(body, "s")]
    assert applied(memoryview(body), changes) == b'{"model":"engine","stream":true,"x":1,"cache_salt":"s"}'
    assert applied(body, ()) == body


# --- what else is read for rules --------------------------------------------------------------------------------------


def request_of(**body: Any) -> Any:
    found = read(
        "POST", CHAT, json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **body}).encode()
    )
    assert isinstance(found, Parsed)
    return found.request


def test_tools_and_media_are_noticed() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert (request_of().tools, request_of().media) == (False, False)
    assert request_of(tools=[{"type": "function", "function": {"name": "f"}}]).tools
    assert not request_of(tools=[]).tools
    parts = [{"type": "text", "text": "what is this?"}, image]
    assert request_of(messages=[{"role": "user", "content": parts}]).media
    assert not request_of(messages=[{"role": "user", "content": parts[:1]}]).media


def test_without_names_a_chain_is_the_same_for_every_model() -> None:
    def hashes(model: str, named: bool) -> tuple[int, ...]:
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        found = read("POST", CHAT, body, limits=Limits(named=named))
        assert isinstance(found, Parsed)
        return found.request.blocks.hashes

    assert hashes("a", False) == hashes("b", False) != ()
    assert hashes("a", True) != hashes("b", True)


def test_where_the_name_stands_is_found_by_whoever_reads_the_body() -> None:
    body = b'{"messages":[],"model":"a"}'
    assert perform(Task("POST", CHAT, Limits(), wants_model=True), body).model == (23, 26)
    assert perform(Task("POST", CHAT, Limits()), body).model is None
    assert perform(Task("POST", CHAT, Limits(), wants_model=True), b"{").model is None
