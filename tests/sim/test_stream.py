from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.sim.stream import Answer, Stream

HEAD = b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
DONE = b"data: [DONE]\n\n"
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":8}}}\n\n'
)


def delta(text: bytes, end: bytes = b"null") -> bytes:
    return b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":%s}]}\n\n' % (text, end)


def read(*chunks: bytes) -> Answer:
    stream = Stream()
    for at, chunk in enumerate(chunks):
        stream.feed(chunk, float(at))
    return stream.answer()


def test_the_first_text_counts_and_not_the_role_before_it() -> None:
    stream = Stream()
    for at, chunk in enumerate([b": keep-alive\n\n", HEAD, delta(b"a"), delta(b"b")]):
        stream.feed(chunk, float(at))
    assert stream.first_at == 2.0


def test_text_and_tokens_come_from_the_deltas() -> None:
    answer = read(HEAD, delta(b"one "), delta(b'\\"two\\" \\u00e9'), DONE)
    assert answer == Answer('one "two" é', 2, None, None, None)


def test_usage_is_read_where_it_is_sent() -> None:
    answer = read(HEAD, delta(b"a"), USAGE, DONE)
    assert (answer.prompt_tokens, answer.cached_tokens) == (10, 8)


def test_usage_without_details_leaves_cached_tokens_unknown() -> None:
    line = b'data: {"choices":[],"usage":{"prompt_tokens":10,"prompt_tokens_details":null}}\n\n'
    answer = read(delta(b"a"), line, DONE)
    assert (answer.prompt_tokens, answer.cached_tokens) == (10, None)


@given(st.lists(st.integers(1, 40)))
def test_any_chunking_gives_the_same_answer(sizes: list[int]) -> None:
    whole = HEAD + delta(b"a\\n") + delta(b"b") + USAGE + DONE
    pieces = []
    rest = whole
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert read(*pieces, rest) == read(whole)


def test_a_stream_without_its_end_broke_off() -> None:
    assert read(HEAD, delta(b"a")).error == "broke off before [DONE]"


def test_an_error_event_under_status_200_is_an_error() -> None:
    event = b'data: {"error":{"message":"EngineCore encountered an issue","code":500}}\n\n'
    error = read(HEAD, delta(b"a"), event, DONE).error
    assert error is not None
    assert error.startswith("error event")
    assert "EngineCore" in error


def test_an_abort_is_an_error() -> None:
    assert read(HEAD, delta(b"a", end=b'"abort"'), DONE).error == "aborted by the engine"


def test_an_empty_body_has_no_first_text() -> None:
    stream = Stream()
    assert stream.answer().error == "broke off before [DONE]"
    assert stream.first_at is None
