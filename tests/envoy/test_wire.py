"""Large messages, read and written by hand, against protobuf."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.envoy import wire
from extproc.envoy.codec import LARGE_BYTES, answer, event
from extproc.envoy.exchange import BodyArrived, EchoBody, Part, SetDestination, Steer
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from tests.envoy.client import body, headers

LARGE = b"x" * (LARGE_BYTES + 1)


@given(data=st.binary(min_size=1, max_size=300), end=st.booleans(), mode=st.none() | st.integers(1, 5))
def test_a_body_is_found_in_place(data: bytes, end: bool, mode: int | None) -> None:
    message = body(data, end)
    if mode is not None:
        message.protocol_config.request_body_mode = mode  # type: ignore[assignment]
        message.metadata_context.filter_metadata["a"].fields["b"].string_value = "c"
    found = wire.request_body(message.SerializeToString())
    assert found is not None
    assert (bytes(found[0]), found[1]) == (data, end)


@given(raw=st.binary(max_size=60))
@example(b"")
@example(b"\x22\x05\x0a\x03ab")
@example(b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")
@example(b"\x22\x03\x0a\x01a\x22\x03\x0a\x01b")  # twice: protobuf merges
@example(b"\x22\x06\x0a\x01a\x0a\x01b")
@example(b"\x22\x04\x08\x01\x0a\x00")
@example(b"\x22\x03\x0a\x01a\x12\x00")  # another kind after it, which counts
@example(b"\x22\x05\x0a\x01a\x10\x00")
@example(b"\x08\x01" * 40 + b"\x22\x03\x0a\x01a")
@example(b"\x25abcd\x22\x03\x0a\x01a")
def test_what_is_found_is_what_protobuf_finds(raw: bytes) -> None:
    found = wire.request_body(raw)
    if found is not None:
        parsed = ProcessingRequest.FromString(raw)
        assert parsed.WhichOneof("request") == "request_body"
        assert (parsed.request_body.body, parsed.request_body.end_of_stream) == (bytes(found[0]), found[1])


@pytest.mark.parametrize(
    "message",
    [headers("/"), ProcessingRequest(request_body={}), ProcessingRequest(response_body={"body": b"x"})],
    ids=["headers", "empty body", "response body"],
)
def test_other_messages_are_left_to_protobuf(message: ProcessingRequest) -> None:
    assert wire.request_body(message.SerializeToString()) is None


def test_a_large_body_is_not_copied_out_of_its_message() -> None:
    raw = body(LARGE).SerializeToString()
    found = event(raw)
    assert found == BodyArrived(LARGE, True)
    assert isinstance(found, BodyArrived)
    assert isinstance(found.data, memoryview)
    assert found.data.obj is raw


def test_a_small_body_is_bytes() -> None:
    found = event(body(b"x").SerializeToString())
    assert isinstance(found, BodyArrived)
    assert type(found.data) is bytes


@given(size=st.sampled_from([1, 100, 127, 128, 16_383, 16_384, LARGE_BYTES]), delta=st.integers(-20, 20))
def test_a_new_body_is_merged_into_the_answer(size: int, delta: int) -> None:
    new = b"x" * max(size + delta, 0)
    response = ProcessingResponse()
    response.request_body.response.clear_route_cache = True
    response.dynamic_metadata.fields["a"].string_value = "b"
    parsed = ProcessingResponse.FromString(wire.with_new_body(response.SerializeToString(), new))
    response.request_body.response.body_mutation.body = new
    assert parsed == response


def test_a_large_new_body_comes_with_everything_else() -> None:
    steer = Steer("f1", "10.0.0.1:80", body=LARGE, strip_usage=True, pool="a")
    parsed = ProcessingResponse.FromString(answer(SetDestination(Part.BODY, steer)))
    small = ProcessingResponse.FromString(answer(SetDestination(Part.BODY, Steer("f1", "10.0.0.1:80", b"", True, "a"))))
    assert parsed.request_body.response.body_mutation.body == LARGE
    common = parsed.request_body.response
    lengths = [h.header.raw_value for h in common.header_mutation.set_headers if h.header.key == "content-length"]
    assert lengths == [str(len(LARGE)).encode()]
    assert common.clear_route_cache
    assert parsed.dynamic_metadata == small.dynamic_metadata


def test_a_piece_given_back_may_be_a_view() -> None:
    parsed = ProcessingResponse.FromString(answer(EchoBody(memoryview(b"abc")[1:], True)))
    assert parsed.request_body.response.body_mutation.streamed_response.body == b"bc"
