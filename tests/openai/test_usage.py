"""Usage and failures of responses that pass, wherever they are cut; samples are of a real vLLM where it has a name."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.types import Usage
from extproc.openai.usage import MAX_HELD, UsageReader, UsageStripper

RECORDED = Path(__file__).parents[1] / "fixtures" / "vllm-0.32"
COUNTS = {
    "prompt_tokens": 14,
    "total_tokens": 22,
    "completion_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 4},
}
READ = Usage(14, 8, 4)


def event(**fields: Any) -> bytes:
    head = {"id": "chatcmpl-87810837a26a6395", "object": "chat.completion.chunk", "created": 1795215103, "model": "m"}
    return b"data: " + json.dumps({**head, **fields}, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, **more: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}], **more)


SAID = '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}} "finish_reason":"abort" data: {"error": {"'
TOKENS = token(" rece") + token(SAID) + token("ET")
USAGE = event(choices=[], usage=COUNTS, system_fingerprint="vllm-0.32.0-a47651d5")
DONE = b"data: [DONE]\n\n"
ANSWER = {"id": "chatcmpl-1", "object": "chat.completion", "choices": [{"message": {"content": SAID}}], "usage": COUNTS}
FAILED = b'data: {"error":{"message":"EngineCore died","code":500}}\n\n'
RESPONSES = {"input_tokens": 14, "output_tokens": 8, "input_tokens_details": {"cached_tokens": 4}, "total_tokens": 22}


def recorded(name: str) -> bytes:
    """The body of a response that was written down with its headers."""
    return (RECORDED / name).read_bytes().partition(b"\r\n\r\n")[2]


def read(pieces: list[bytes], is_stream: bool, watches: bool = True) -> UsageReader:
    reader = UsageReader(is_stream, watches)
    for piece in pieces:
        reader.take(piece)
    return reader


def stripped(pieces: list[bytes]) -> bytes:
    stripper = UsageStripper()
    return b"".join([stripper.take(piece) for piece in pieces] + [stripper.end()])


def in_two(whole: bytes) -> list[list[bytes]]:
    """Cut at every byte."""
    return [[whole[:at], whole[at:]] for at in range(len(whole) + 1)]


def single(whole: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in whole]


@st.composite
def pieces(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    cuts = draw(st.lists(st.integers(0, len(whole)), max_size=12))
    return [whole[a:b] for a, b in pairwise(sorted({0, len(whole), *cuts}))]


BODIES: dict[str, tuple[bool, bytes, Usage | None, bool]] = {
    "stream": (True, TOKENS + USAGE + DONE, READ, False),
    "stream, spaced": (True, TOKENS + USAGE.replace(b":", b": ").replace(b",", b" , ") + DONE, READ, False),
    "stream, usage in each event": (
        True,
        token("a", usage={**COUNTS, "completion_tokens": 1}) + token("b", usage=COUNTS) + DONE,
        READ,
        False,
    ),
    "stream, usage null": (True, token("a", usage=None) + DONE, None, False),
    "stream without": (True, b": ping\n\n" + TOKENS + DONE, None, False),
    "stream that fails": (True, TOKENS + FAILED + DONE, None, True),
    "stream that is aborted": (
        True,
        token("a") + event(choices=[{"index": 0, "delta": {}, "finish_reason": "abort"}]) + USAGE + DONE,
        READ,
        True,
    ),
    "JSON": (False, json.dumps(ANSWER).encode(), READ, False),
    "JSON with more behind the usage": (
        False,
        json.dumps({**ANSWER, "prompt_token_ids": [*range(9000)], "kv": {"usage": None, "more": "usage"}}).encode(),
        READ,
        False,
    ),
    "JSON, braces in a string of the usage": (
        False,
        json.dumps({"usage": {"note": '} "\\', **COUNTS}}).encode(),
        READ,
        False,
    ),
    "JSON that fails": (False, b'{"error": {"message": "m"}}', None, True),
    "JSON that is aborted": (
        False,
        json.dumps({**ANSWER, "choices": [{"finish_reason": "abort"}]}).encode(),
        READ,
        True,
    ),
    "JSON, usage in the usage": (
        False,
        json.dumps({"usage": {**COUNTS, "usage": {"prompt_tokens": 1}}}).encode(),
        READ,
        False,
    ),
    "JSON that shows too late what it is": (
        False,
        json.dumps({**ANSWER, "id": "x" * 600, "choices": [{"finish_reason": "abort"}]}).encode(),
        READ,
        False,
    ),
    "/v1/responses": (False, json.dumps({"id": "r", "output": [SAID], "usage": RESPONSES}).encode(), READ, False),
    "/v1/responses that repeats what a client says": (
        False,
        json.dumps(
            {"id": "r", "object": "response", "tools": {"usage": {"prompt_tokens": 9}, "finish_reason": "abort"}}
            | {"usage": RESPONSES}
        ).encode(),
        READ,
        False,
    ),
    "nothing": (False, b"", None, False),
    "no JSON at all": (False, b'\xff"usage": {"prompt_tokens": nan}', None, False),
    "cut off": (False, json.dumps(ANSWER).encode()[:-9], None, False),
}


@pytest.mark.parametrize("name", BODIES)
def test_wherever_it_is_cut_the_same_is_read(name: str) -> None:
    is_stream, whole, usage, broken = BODIES[name]
    ways = [*in_two(whole), single(whole)] if len(whole) < 4000 else [[whole], single(whole)]
    found = [read(way, is_stream) for way in ways]
    assert {(reader.usage, reader.broken) for reader in found} == {(usage, broken)}


@given(st.data())
def test_any_chunking_reads_the_same(data: st.DataObject) -> None:
    is_stream, whole, usage, broken = data.draw(st.sampled_from([*BODIES.values()]))
    reader = read(data.draw(pieces(whole)), is_stream)
    assert (reader.usage, reader.broken) == (usage, broken)


@pytest.mark.parametrize(
    ("name", "is_stream", "usage", "broken"),
    [
        ("chat_nonstream.txt", False, Usage(14, 8, None), False),
        ("chat_stream.txt", True, Usage(14, 8, None), False),
        ("completion_nonstream.txt", False, Usage(7, 8, None), False),
        ("completion_stream.txt", True, Usage(7, 5, None), False),
        ("lora_completion.txt", False, Usage(2, 1, 0), False),
        ("engine_killed_stream.txt", True, None, True),
    ],
)
def test_what_vllm_said(name: str, is_stream: bool, usage: Usage | None, broken: bool) -> None:
    reader = read([recorded(name)], is_stream)
    assert (reader.usage, reader.broken) == (usage, broken)


def test_under_another_status_a_failure_is_no_news() -> None:
    assert not read([b'{"error": {"message": "m"}}'], False, watches=False).broken


@pytest.mark.parametrize("value", [True, -1, 2**60, 1.5, "8", None])
def test_a_count_that_is_none_is_unknown(value: object) -> None:
    whole = json.dumps({"usage": {"prompt_tokens": value, "completion_tokens": 8}}).encode()
    assert read([whole], False).usage == Usage(None, 8)


def test_what_is_kept_is_bounded() -> None:
    reader = UsageReader(True)
    for piece in (b'"usage": {"a": "', *[b"x" * 1000] * 40, b"z" * 100_000, b"\n\n"):
        reader.take(piece)
        assert len(reader._rest) <= MAX_HELD


# --- the event that was asked for by us -------------------------------------------------------------------------------

STREAMS: dict[str, tuple[bytes, bytes]] = {
    "an event": (TOKENS + USAGE + DONE, TOKENS + DONE),
    "spaces in the JSON": (
        TOKENS + USAGE.replace(b":", b": ").replace(b",", b" , ") + DONE,
        TOKENS + DONE,
    ),
    "nothing after it": (TOKENS + USAGE, TOKENS),
    "nothing else": (USAGE, b""),
    "only the first": (USAGE + USAGE, USAGE),
    "line ends of two bytes": (
        (TOKENS + USAGE + DONE).replace(b"\n", b"\r\n"),
        (TOKENS + DONE).replace(b"\n", b"\r\n"),
    ),
    "blank lines": (TOKENS + b"\n" + USAGE + b"\n\n\r\n\n" + DONE, TOKENS + b"\n\n\n\r\n\n" + DONE),
}
STREAMS |= {
    name: (whole, whole)
    for name, whole in {
        "no usage event": TOKENS + DONE,
        "usage in events with choices": token("a", usage=COUNTS) + token("b", usage=COUNTS) + DONE,
        "no blank line at the end": TOKENS + DONE.rstrip(),
        "cut off within an event": TOKENS + USAGE[:100],
        "choices and, deeper, an event like the usage": token("a", more={"choices": [], "usage": COUNTS}) + DONE,
        "large events": token("x" * 2 * MAX_HELD) + token("y" * 2 * MAX_HELD),
        "large and no event at all": b"data: " + b"z" * 3 * MAX_HELD,
        "too large to be the usage": event(choices=[], usage=COUNTS, more="x" * MAX_HELD),
        "an error": FAILED + DONE,
        "no choices and no usage": event(choices=[], prompt_filter_results=[]) + DONE,
        "nothing": b"",
    }.items()
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_usage_event_goes_wherever_the_stream_is_cut(name: str) -> None:
    whole, wanted = STREAMS[name]
    ways = [*in_two(whole), single(whole)] if len(whole) < 4000 else [[whole], [whole[:-1], whole[-1:]], single(whole)]
    assert {stripped(way) for way in ways} == {wanted}


@given(st.data())
def test_any_chunking_gives_the_stream_without_the_event(data: st.DataObject) -> None:
    whole, wanted = data.draw(st.sampled_from([*STREAMS.values()]))
    assert stripped(data.draw(pieces(whole))) == wanted


def test_no_event_waits_for_the_next() -> None:
    stripper = UsageStripper()
    for text in ("a", SAID, "x" * 2 * MAX_HELD):
        assert stripper.take(token(text)) == token(text)


def test_what_is_kept_of_an_event_is_bounded() -> None:
    stripper = UsageStripper()
    pieces = [b"data: ", *[b"z" * 1000] * 40]
    went = b""
    for piece in pieces:
        went += stripper.take(piece)
        assert len(stripper._held) <= MAX_HELD
    assert went == b"".join(pieces)


def test_of_an_unfinished_event_only_what_may_be_the_usage_is_kept() -> None:
    stripper = UsageStripper()
    head, rest = token("abc")[:-20], token("abc")[-20:]
    assert stripper.take(head) == head, "it has choices"
    assert stripper.take(rest) == rest.rstrip(b"\n") + b"\n\n"
    assert stripper.take(USAGE[:-1]) == b""
    assert stripper.take(USAGE[-1:]) == b""
    assert stripper.end() == b""
