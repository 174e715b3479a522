"""Bodies in, requests out; refusals against recorded answers of vLLM 0.32."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.types import Api, Request
from extproc.openai.body import Change
from extproc.openai.errors import BadRequest, of_bad_request
from extproc.openai.prompt import MEDIA_BYTES
from extproc.openai.reading import Task, perform
from extproc.openai.requests import (
    MAX_SAMPLES,
    MAX_SESSION,
    TRANSFER_FIELDS,
    Limits,
    Parsed,
    is_read,
    read,
    with_usage,
)
from tests.openai.samples import sample

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
PATHS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    COMPLETIONS: {"model": "m", "prompt": "hello"},
    RESPONSES: {"model": "m", "input": "hello"},
    EMBEDDINGS: {"model": "m", "input": "hello"},
}


def parsed(path: str, body: bytes | dict[str, Any]) -> Parsed:
    """Read what must be readable."""
    read_body = read("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert isinstance(read_body, Parsed), read_body
    return read_body


def request(path: str, **more: Any) -> Request:
    return parsed(path, {**MINIMAL[path], **more}).request


def refused(path: str, body: bytes | dict[str, Any]) -> BadRequest:
    """Read what must be refused."""
    bad = read("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert isinstance(bad, BadRequest), bad
    return bad


@pytest.mark.parametrize("field", TRANSFER_FIELDS)
def test_clients_do_not_say_where_a_cache_comes_from(field: str) -> None:
    body = json.dumps({**HELLO, field: {"remote_host": "10.1.2.3"}}).encode()
    assert isinstance(read("POST", CHAT, body), Parsed)
    bad = read("POST", CHAT, body, limits=Limits(transfers=False))
    assert isinstance(bad, BadRequest)
    assert (bad.param, field in bad.message) == (field, True)
    assert isinstance(
        read("POST", CHAT, json.dumps({**HELLO, field: None}).encode(), limits=Limits(transfers=False)), Parsed
    )


# --- which requests are read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_posts_on_the_four_paths_are_read(path: str) -> None:
    assert is_read("POST", path)
    assert is_read("POST", path + "?api-version=1")
    assert not is_read("GET", path)
    assert not is_read("POST", path + "/")
    assert not is_read("POST", "/openai" + path)


def test_other_paths_are_routed_without_a_look_at_the_body() -> None:
    assert read("GET", "/v1/models", None) == Parsed(Request(api=Api.OTHER))
    assert read("POST", "/tokenize", b"not json") == Parsed(Request(api=Api.OTHER))


def test_a_body_that_is_not_available_is_weighed_by_its_length() -> None:
    assert read("POST", CHAT, None, 5000) == Parsed(Request(api=Api.CHAT, prompt_bytes=5000))
    assert read("POST", CHAT, None) == Parsed(Request(api=Api.CHAT))


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_chat_request_in_full() -> None:
    long = "x" * 1000
    body = {
        "model": "m", "messages": [{"role": "user", "content": long}], "stream": True, "n": 2, "max_tokens": 7,
        "priority": 3, "session_id": "s", "stream_options": {"include_usage": True}, "temperature": 0.1,
    }  # fmt: skip
    found = parsed(CHAT, body)
    assert found.streams_usage
    got = found.request
    assert (got.api, got.model, got.stream, got.samples, got.max_output_tokens) == (Api.CHAT, "m", True, 2, 7)
    assert (got.session, got.priority, got.prompt_tokens) == ("s", -3, None)
    assert got.prompt_bytes == len(b"\xffuser\xfe" + long.encode())
    assert got.blocks.ends == (256, 512, 768)


@pytest.mark.parametrize(("path", "limit"), [(CHAT, None), (COMPLETIONS, 16), (RESPONSES, None), (EMBEDDINGS, 0)])
def test_without_a_limit_the_apis_own_counts(path: str, limit: int | None) -> None:
    assert request(path).max_output_tokens == limit
    assert request(path, max_tokens=None, max_completion_tokens=None, max_output_tokens=None).max_output_tokens == limit


def test_the_limit_is_read_under_each_of_its_names() -> None:
    assert request(CHAT, max_tokens=5).max_output_tokens == 5
    assert request(CHAT, max_tokens=5, max_completion_tokens=3).max_output_tokens == 3
    assert request(CHAT, max_tokens=-5, max_completion_tokens=3).max_output_tokens == 3
    assert request(COMPLETIONS, max_tokens=5).max_output_tokens == 5
    assert request(COMPLETIONS, max_tokens=0, echo=True).max_output_tokens == 0
    assert request(RESPONSES, max_output_tokens=5).max_output_tokens == 5
    assert request(EMBEDDINGS, max_tokens=5).max_output_tokens == 0


def test_every_sequence_that_runs_is_counted() -> None:
    assert request(CHAT).samples == 1
    assert request(CHAT, n=None).samples == 1
    assert request(CHAT, n=3, best_of=9).samples == 3
    assert request(COMPLETIONS, n=2, best_of=4).samples == 4
    assert request(COMPLETIONS, n=2, prompt=["a", "b", "c"]).samples == 6
    assert request(EMBEDDINGS, n="x", input=["a", "b"]).samples == 2
    assert request(CHAT, n=10**30).samples == MAX_SAMPLES


def test_token_ids_give_an_exact_count() -> None:
    assert request(COMPLETIONS, prompt=[1, 2, 3]).prompt_tokens == 3
    assert request(EMBEDDINGS, input=[[1, 2, 3], [4]]).prompt_tokens == 4


def test_embeddings_of_a_conversation_are_read_like_chat() -> None:
    body = {"model": "m", "messages": HELLO["messages"]}
    assert parsed(EMBEDDINGS, body).request.prompt_bytes == request(CHAT).prompt_bytes


def test_completions_accept_tensors_instead_of_text() -> None:
    assert parsed(COMPLETIONS, {"model": "m", "prompt_embeds": "QUFB"}).request.prompt_bytes == MEDIA_BYTES


def test_a_session_is_a_short_string_or_none() -> None:
    assert request(CHAT, session_id="s" * MAX_SESSION).session is not None
    for odd in ("", 5, None, ["s"], "s" * (MAX_SESSION + 1)):
        assert request(CHAT, session_id=odd).session is None


def test_prompts_for_another_model_adapter_or_tenant_share_no_block() -> None:
    text = "x" * 1000
    chains = [
        set(parsed(COMPLETIONS, {"prompt": text, **who}).request.blocks.hashes)
        for who in (
            {"model": "m"},
            {"model": "n"},
            {"model": "m", "cache_salt": "s"},
            {"model": "m", "cache_salt": "t"},
        )
    ]
    assert all(len(chain) == 3 for chain in chains)
    assert len(set().union(*chains)) == 12


@pytest.mark.parametrize(
    "respelled",
    [
        b'{"messages":[{"content":"hello","role":"user"}],"model":"m"}',
        b' {\n"model" : "m" , "messages":[ {"role":"\\u0075ser","content":"\\u0068ello"} ] }\r\n',
        b'\xef\xbb\xbf{"model":"m","messages":[{"role":"user","content":"hello"}]}',
        b'{"model":"x","model":"m","messages":[],"messages":[{"role":"user","content":"hello"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"hello"}],"temperature":NaN,"unknown":null}',
    ],
)
def test_the_way_in_which_json_is_written_does_not_matter(respelled: bytes) -> None:
    assert parsed(CHAT, respelled).request == request(CHAT)


def test_what_vllm_takes_leniently_is_taken() -> None:
    got = request(CHAT, max_tokens="5", n=2.0, stream="true", priority=None, tools=None, cache_salt=None, extra=[1])
    assert (got.max_output_tokens, got.samples, got.stream, got.priority) == (5, 2, True, 0)


def test_half_a_surrogate_pair_is_no_obstacle() -> None:
    body = b'{"model":"m\\ud800","messages":[{"role":"\\udfff","content":"\\ud800"}],"session_id":"\\ud800"}'
    got = parsed(CHAT, body).request
    assert (got.model, got.session) == ("m?", "?")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bad_value", "invalid_json", "missing_field"])
def test_mistakes_are_answered_as_vllm_does(name: str) -> None:
    recorded = sample(name)
    ours = of_bad_request(refused(recorded.path, recorded.sent))
    assert (ours.status, ours.body) == (recorded.status, recorded.body)


@pytest.mark.parametrize("name", ["unknown_model", "max_tokens_too_big"])
def test_what_only_the_engine_can_know_is_left_to_it(name: str) -> None:
    recorded = sample(name)
    assert parsed(recorded.path, recorded.sent)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
def test_a_body_must_name_its_model(path: str, model: dict[str, Any]) -> None:
    body = {key: value for key, value in MINIMAL[path].items() if key != "model"}
    bad = refused(path, body | model)
    assert (bad.status, bad.type, bad.param) == (400, "Bad Request", "body.model")
    assert "Field required" in bad.message


@pytest.mark.parametrize(
    ("path", "changed", "param"),
    [
        (CHAT, {"model": 5}, "body.model"),
        (CHAT, {"model": "m" * 5000}, "body.model"),
        (CHAT, {"messages": None}, "body.messages"),
        (CHAT, {"messages": {}}, "body.messages"),
        (CHAT, {"messages": "hello"}, "body.messages"),
        (CHAT, {"messages": [{"role": "user"}, "hello"]}, "body.messages.1"),
        (CHAT, {"tools": {}}, "body.tools"),
        (CHAT, {"stream": "maybe"}, "body.stream"),
        (CHAT, {"stream": []}, "body.stream"),
        (CHAT, {"stream_options": [1]}, "body.stream_options"),
        (CHAT, {"max_tokens": "many"}, "body.max_tokens"),
        (CHAT, {"max_tokens": 1.5}, "body.max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": -1}, "max_tokens"),
        (CHAT, {"n": 0}, None),
        (CHAT, {"n": [1]}, "body.n"),
        (CHAT, {"priority": "high"}, "body.priority"),
        (CHAT, {"cache_salt": 5}, "cache_salt"),
        (CHAT, {"cache_salt": ""}, "cache_salt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": 5}, "body.prompt.str"),
        (COMPLETIONS, {"prompt": {}}, "body.prompt.str"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (RESPONSES, {"input": None}, "body.input"),
        (RESPONSES, {"input": 5}, "body.input"),
        (RESPONSES, {"input": ["hello"]}, "body.input.0"),
        (RESPONSES, {"instructions": 5}, "body.instructions"),
        (RESPONSES, {"max_output_tokens": 0}, "max_tokens"),
        (EMBEDDINGS, {"input": {}}, "body.input.str"),
        (EMBEDDINGS, {"input": None}, "body.input.str"),
    ],
)
def test_what_certainly_fails_is_refused_here(path: str, changed: dict[str, Any], param: str | None) -> None:
    assert refused(path, {**MINIMAL[path], **changed}).param == param


@pytest.mark.parametrize(
    ("path", "param"),
    [(CHAT, "body.messages"), (COMPLETIONS, "prompt"), (RESPONSES, "body.input"), (EMBEDDINGS, "body.input")],
)
def test_a_body_must_have_a_prompt(path: str, param: str) -> None:
    assert refused(path, {}).param == param
    assert refused(path, {"model": "m"}).param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b" ", "body.1"),
        (b"hello", "body.0"),
        (b'{"model":"m"} x', "body.14"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"null", "body"),
        (b'{"model":"\xff"}', None),
        (json.dumps(HELLO).encode("utf-16"), None),
        (b"[" * 100_000, None),
        (b'{"a":' * 100_000, None),
        (b'{"model":' + b"9" * 5000 + b"}", None),
    ],
)
def test_what_is_no_object_is_refused(body: bytes, param: str | None) -> None:
    assert refused(CHAT, body).param == param


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(alphabet=st.characters(), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
known_keys = st.sampled_from(
    ["messages", "prompt", "input", "tools", "stream", "stream_options", "n", "best_of", "max_tokens", "priority",
     "max_completion_tokens", "max_output_tokens", "cache_salt", "session_id", "instructions", "prompt_embeds", "echo"]
)  # fmt: skip
known_objects = st.dictionaries(
    st.sampled_from(["role", "content", "type", "text", "tool_calls", "name", "output"]), json_values
)
odd_bodies = st.builds(
    lambda given, model: {**given, **model},
    st.dictionaries(known_keys, st.one_of(json_values, st.lists(known_objects, max_size=3))),
    st.one_of(st.just({}), st.just({"model": "m"})),
)


@given(st.binary(), st.sampled_from(PATHS))
def test_any_bytes_are_read_or_refused(body: bytes, path: str) -> None:
    assert isinstance(read("POST", path, body), Parsed | BadRequest)


@given(odd_bodies, st.sampled_from(PATHS))
def test_any_object_is_read_or_refused(given_body: dict[str, Any], path: str) -> None:
    found = read("POST", path, json.dumps(given_body).encode())
    if isinstance(found, BadRequest):
        assert json.loads(of_bad_request(found).body)["error"]["code"] == 400
    else:
        assert found.request.model == "m"
        assert found.request.samples >= 1


# --- asking for usage -------------------------------------------------------------------------------------------------

STREAM = b'"model":"m","messages":[{"role":"user","content":"hello"}],"stream":true'


def usage_of(body: bytes, path: str = CHAT) -> bytes | None:
    return with_usage(parsed(path, body), body)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"{%s}", b'{%s,"stream_options":{"include_usage":true}}'),
        (b"{%s } \r\n\t", b'{%s ,"stream_options":{"include_usage":true}} \r\n\t'),
        (b"\xef\xbb\xbf{%s}", b'\xef\xbb\xbf{%s,"stream_options":{"include_usage":true}}'),
        (
            b'{%s,"tools":[{"stream_options":{"include_usage":true}}]}',
            b'{%s,"tools":[{"stream_options":{"include_usage":true}}],"stream_options":{"include_usage":true}}',
        ),
        (
            b'{%s,"seed":12345678901234567890123, "a":1.10, "a":NaN}',
            b'{%s,"seed":12345678901234567890123, "a":1.10, "a":NaN,"stream_options":{"include_usage":true}}',
        ),
        (b'{"stream_options":null,%s}', b'{"stream_options":{"include_usage":true},%s}'),
        (b'{"stream_options" : { } ,%s}', b'{"stream_options" : {"include_usage":true} ,%s}'),
        (b'{%s,"stream_options":{"include_usage":false}}', b'{%s,"stream_options":{"include_usage":true}}'),
        (
            b'{"seed":12345678901234567890123,%s,"stream_options":{"x":1}}',
            b'{"seed":12345678901234567890123,%s,"stream_options":{"x":1,"include_usage":true}}',
        ),
        (
            b'{"stream_options":{},%s,"tools":[{"stream_options":{}}]}',
            b'{"stream_options":{"include_usage":true},%s,"tools":[{"stream_options":{}}]}',
        ),
        (
            b'{"stream_options":{},%s,"stop":"\\"stream_options\\":{}"}',
            b'{"stream_options":{"include_usage":true},%s,"stop":"\\"stream_options\\":{}"}',
        ),
        (
            b'{"stream_options":{"include_usage":true},%s,"stream_options":{}}',
            b'{"stream_options":{"include_usage":true},%s,"stream_options":{"include_usage":true}}',
        ),
    ],
)
def test_usage_is_asked_for_and_nothing_else_changes(before: bytes, after: bytes) -> None:
    assert usage_of(before.replace(b"%s", STREAM)) == after.replace(b"%s", STREAM)


def test_usage_in_every_chunk_is_not_switched_on_by_the_way() -> None:
    changed = usage_of(b'{%s,"stream_options":{"continuous_usage_stats":true}}' % STREAM)
    assert changed
    assert json.loads(changed)["stream_options"] == {"include_usage": True, "continuous_usage_stats": False}


@pytest.mark.parametrize(
    "body",
    [
        b"{%s}" % STREAM.replace(b"true", b"false"),
        b'{%s,"stream_options":{"include_usage":true}}' % STREAM,
        b'{%s,"stream_options":{"include_usage":"yes"}}' % STREAM,
        b'{%s,"stream_options":{"include_usage":[1]}}' % STREAM,
    ],
)
def test_a_body_that_needs_no_change_gets_none(body: bytes) -> None:
    assert usage_of(body) is None


def test_options_that_are_spelled_too_oddly_are_left_alone() -> None:
    assert usage_of(b'{%s,"stream\\u005foptions":{}}' % STREAM) is None
    assert usage_of(b'{%s,"stream_options":{"x":{}}}' % STREAM) is None


def test_usage_is_asked_for_where_a_stream_would_not_tell_it() -> None:
    for path, asks in ((CHAT, True), (COMPLETIONS, True), (RESPONSES, False), (EMBEDDINGS, False)):
        body = json.dumps({**MINIMAL[path], "stream": True}).encode()
        assert (usage_of(body, path) is not None) == asks
    assert with_usage(Parsed(Request()), b"") is None


@given(
    more=st.dictionaries(st.sampled_from(["stop", "user", "x", "metadata"]), json_values),
    options=st.sampled_from([{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}]),
    indent=st.sampled_from([None, 2]),
    last=st.booleans(),
)
def test_of_any_body_only_the_options_change(more: Any, options: Any, indent: int | None, last: bool) -> None:
    given_body = {**HELLO, "stream": True, **(more | options if last else options | more)}
    changed = usage_of(json.dumps(given_body, indent=indent).encode())
    if changed is None:  # NaN equals nothing, so the change could not be checked
        assert options
        assert "NaN" in json.dumps(more)
    else:
        assert repr(json.loads(changed)) == repr({**given_body, "stream_options": {"include_usage": True}})


# --- bounds -----------------------------------------------------------------------------------------------------------


def nested(levels: int, opening: str = "[", closing: str = "]") -> bytes:
    """A body whose deepest place is so many levels down."""
    return b'{"model":"m","messages":[],"x":%s}' % (opening * (levels - 1) + closing * (levels - 1)).encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":[', "]}")])
def test_depth_is_bounded(opening: str, closing: str) -> None:
    levels = 65 if opening == "[" else 33  # the second nests by two
    limits = Limits(max_depth=65)
    assert isinstance(read("POST", CHAT, nested(levels, opening, closing), limits=limits), Parsed)
    bad = read("POST", CHAT, nested(levels + 1, opening, closing), limits=limits)
    assert bad == BadRequest("There was an error parsing the body: it nests deeper than 65 levels", "Bad Request")


@pytest.mark.parametrize("levels", [900, 5_000, 300_000])
def test_whatever_the_parser_does_with_depth_it_is_refused(levels: int) -> None:
    assert refused(CHAT, nested(levels)).message.startswith("There was an error parsing the body")


def test_brackets_are_no_depth() -> None:
    wide = b'{"model":"m","messages":[%s],"x":"%s"}' % (b'{"role":"user","content":"{[{["},' * 500, b"[" * 500)
    assert isinstance(read("POST", CHAT, wide.replace(b",]", b"]"), limits=Limits(max_depth=8)), Parsed)


def test_the_chain_of_a_prompt_ends_at_the_limit() -> None:
    body = json.dumps({**HELLO, "messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    whole = parsed(CHAT, body).request.blocks
    cut = read("POST", CHAT, body, limits=Limits(max_blocks=16))
    assert isinstance(cut, Parsed)
    assert (cut.request.blocks.hashes, cut.request.blocks.ends) == (whole.hashes[:16], whole.ends[:16])
    assert cut.request.prompt_bytes == parsed(CHAT, body).request.prompt_bytes


# --- reading as a value -----------------------------------------------------------------------------------------------


def test_the_change_is_small_and_does_what_with_usage_does() -> None:
    body = b'{"stream_options":null,%s}' % STREAM
    done = perform(Task("POST", CHAT, Limits(), wants_usage=True), body)
    assert isinstance(done.result, Parsed)
    assert done.usage == Change(18, 22, b'{"include_usage":true}')
    assert done.usage.apply(memoryview(body)) == with_usage(done.result, body)


def test_no_change_is_looked_for_unless_it_is_wanted() -> None:
    body = b"{%s}" % STREAM
    assert perform(Task("POST", CHAT, Limits()), body).usage is None
    assert perform(Task("POST", CHAT, Limits(), wants_usage=True), b"{").usage is None
