from __future__ import annotations

from typing import Any

import pytest

from extproc.envoy import codec, names
from extproc.envoy.exchange import (
    CLOSE,
    BodyArrived,
    Content,
    Continue,
    EchoBody,
    HeadersArrived,
    Mode,
    Part,
    Respond,
    ResponseArrived,
    SetDestination,
    Steer,
    TrailersArrived,
)
from extproc.openai.errors import HttpError
from extproc.pb.envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from extproc.pb.envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

WANTED = codec.ALWAYS | {"x-session-id"}
SUBSET = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset")


def request(**headers: str) -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_headers.SetInParent()
    for key, value in headers.items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = key.replace("_", "-").replace("~", ":"), value.encode()
    return message


def headers_of(message: ProcessingRequest) -> HeadersArrived:
    event = codec.event(message.SerializeToString(), WANTED)
    assert isinstance(event, HeadersArrived)
    return event


def hinted(value: Any) -> frozenset[str] | None:
    message = request()
    message.metadata_context.filter_metadata[SUBSET[0]].update({SUBSET[1]: value})
    return headers_of(message).head.subset


def answered(command: Any) -> ProcessingResponse:
    return ProcessingResponse.FromString(codec.answer(command))


# --- in ---------------------------------------------------------------------------------------------------------------


def test_only_wanted_headers_are_kept() -> None:
    message = request(**{"~method": "POST", "~path": "/v1/x?y", "x_session_id": "s", "cookie": "no"})
    head = headers_of(message).head
    assert (head.method, head.path, head.content_length) == ("POST", "/v1/x?y", None)
    assert head.headers == {":method": "POST", ":path": "/v1/x?y", "x-session-id": "s"}


@pytest.mark.parametrize(
    ("text", "length"), [("12", 12), ("0", 0), ("", None), ("-1", None), ("1e3", None), ("9" * 40, None), ("²", None)]
)
def test_content_length(text: str, length: int | None) -> None:
    assert headers_of(request(content_length=text)).head.content_length == length


def test_a_header_in_the_field_of_older_proxies_is_read() -> None:
    message = request()
    header = message.request_headers.headers.headers.add()
    header.key, header.value = ":path", "/old"
    assert headers_of(message).head.path == "/old"


def test_a_header_that_is_not_utf8_does_no_harm() -> None:
    message = request()
    header = message.request_headers.headers.headers.add()
    header.key, header.raw_value = "x-session-id", b"a\xff"
    assert headers_of(message).head.headers == {"x-session-id": "a�"}


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        (0, Mode.NONE),
        (1, Mode.STREAMED),
        (2, Mode.BUFFERED),
        (3, Mode.BUFFERED_PARTIAL),
        (4, Mode.FULL_DUPLEX),
        (5, Mode.GRPC),
        (77, Mode.NONE),
    ],
)
def test_mode(number: Any, mode: Mode) -> None:
    message = request()
    message.protocol_config.request_body_mode = number
    assert headers_of(message).mode is mode


def test_streamed_without_waiting_is_a_mode_of_its_own() -> None:
    message = request()
    message.protocol_config.request_body_mode = 1  # type: ignore[assignment]
    message.protocol_config.send_body_without_waiting_for_header_response = True
    assert headers_of(message).mode is Mode.STREAMED_EARLY


def test_an_older_proxy_does_not_tell_its_mode() -> None:
    assert headers_of(request()).mode is Mode.UNTOLD


def test_a_proxy_that_streams_the_response_through_us_says_so() -> None:
    message = request()
    assert not headers_of(message).duplex_response
    message.protocol_config.response_body_mode = 4  # type: ignore[assignment]
    assert headers_of(message).duplex_response


@pytest.mark.parametrize(
    ("value", "subset"),
    [
        ("10.0.0.1:8000", {"10.0.0.1:8000"}),
        ("10.0.0.1:8000, 10.0.0.2", {"10.0.0.1:8000", "10.0.0.2"}),
        (["10.0.0.1:8000", "10.0.0.2:8000"], {"10.0.0.1:8000", "10.0.0.2:8000"}),
        (["10.0.0.1,10.0.0.2"], {"10.0.0.1", "10.0.0.2"}),
        ("[::1]:80", {"[::1]:80"}),
        ("", set()),
        (" , ", set()),
        ([], set()),
        (7, set()),
        (None, set()),
    ],
)
def test_subset_hint(value: Any, subset: set[str]) -> None:
    assert hinted(value) == frozenset(subset)


def test_no_hint_is_no_restriction() -> None:
    assert headers_of(request()).head.subset is None
    message = request()
    message.metadata_context.filter_metadata["envoy.lb"].update({SUBSET[1]: "10.0.0.1"})
    message.metadata_context.filter_metadata[SUBSET[0]].update({"another": "10.0.0.1"})
    assert headers_of(message).head.subset is None


def test_body_trailers_and_responses() -> None:
    def event(**fields: Any) -> Any:
        return codec.event(ProcessingRequest(**fields).SerializeToString())

    assert event(request_body={"body": b"x", "end_of_stream": True}) == BodyArrived(b"x", True)
    assert event(request_trailers={}) == TrailersArrived()
    assert event(response_headers={}) == ResponseArrived(Part.RESPONSE_HEADERS)
    assert event(response_trailers={}) == ResponseArrived(Part.RESPONSE_TRAILERS)
    body = event(response_body={"body": b"x", "end_of_stream": True}, protocol_config={"response_body_mode": 4})
    assert body == ResponseArrived(Part.RESPONSE_BODY, b"x", True, duplex=True)


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"content-type": "application/json"}, Content.JSON),
        ({"content-type": "Application/JSON; charset=utf-8"}, Content.JSON),
        ({"content-type": "text/event-stream; charset=utf-8"}, Content.STREAM),
        ({"content-type": "text/event-stream", "content-encoding": "identity"}, Content.STREAM),
        ({"content-type": "text/event-stream", "content-encoding": "gzip"}, Content.OTHER),
        ({"content-type": "application/json-seq"}, Content.OTHER),
        ({}, Content.OTHER),
    ],
)
def test_as_what_a_response_can_be_read(headers: dict[str, str], content: Content) -> None:
    message = ProcessingRequest(response_headers={})
    for key, value in headers.items():
        message.response_headers.headers.headers.add(key=key, raw_value=value.encode())
    found = codec.event(message.SerializeToString())
    assert isinstance(found, ResponseArrived)
    assert found.content is content


@pytest.mark.parametrize(
    ("request_mode", "response_mode", "is_read"),
    [(None, None, True), (2, 0, True), (4, 0, False), (4, 1, False), (4, 4, True)],
)
def test_usage_is_read_by_our_own_proxy_and_of_what_goes_through_us(
    request_mode: int | None, response_mode: int | None, is_read: bool
) -> None:
    message = request()
    if request_mode is not None:
        message.protocol_config.request_body_mode = request_mode  # type: ignore[assignment]
        message.protocol_config.response_body_mode = response_mode  # type: ignore[assignment]
    assert headers_of(message).head.usage_is_read is is_read


@pytest.mark.parametrize(
    ("mode", "mirrors"), [(None, False), (0, False), (1, False), (2, True), (3, False), (4, False)]
)
def test_copies_are_made_by_our_own_proxy_alone(mode: int | None, mirrors: bool) -> None:
    message = request()
    if mode is not None:
        message.protocol_config.request_body_mode = mode  # type: ignore[assignment]
    assert headers_of(message).head.mirrors is mirrors


@pytest.mark.parametrize("raw", [b"", b"\xff\xff", b"\x0a\x05abc"])
def test_what_cannot_be_read_is_said(raw: bytes) -> None:
    with pytest.raises(codec.Unreadable):
        codec.event(raw)


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", Part)
def test_continue_answers_the_right_part_and_changes_nothing(part: Part) -> None:
    response = answered(Continue(part))
    assert response.WhichOneof("response") == part.value
    assert response.ByteSize() == 2


def test_a_pick_is_metadata_alone() -> None:
    response = answered(SetDestination(Part.BODY, Steer("f1", "10.0.0.1:80,10.0.0.2:80")))
    assert response.WhichOneof("response") == "request_body"
    assert not response.request_body.HasField("response")
    assert response.dynamic_metadata == {
        "envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:80,10.0.0.2:80"},
        "extproc": {"flight": "f1"},
    }


def set_headers(mutation: Any) -> dict[str, bytes]:
    assert all(o.append_action == 2 for o in mutation.set_headers)  # overwrite
    return {o.header.key: o.header.raw_value for o in mutation.set_headers}


def test_under_the_endpoint_picker_protocol_the_header_says_the_same() -> None:
    common = answered(SetDestination(Part.HEADERS, Steer("f", "10.0.0.1:80"), in_header=True)).request_headers.response
    assert set_headers(common.header_mutation) == {"x-gateway-destination-endpoint": b"10.0.0.1:80"}
    assert not common.clear_route_cache


def test_a_new_body_comes_with_its_length() -> None:
    response = answered(SetDestination(Part.BODY, Steer("f", "a:1", body=b"four", strip_usage=True)))
    common = response.request_body.response
    assert common.body_mutation.body == b"four"
    assert set_headers(common.header_mutation) == {"content-length": b"4"}
    assert response.dynamic_metadata["extproc"] == {"flight": "f", "strip_usage": True}


def test_a_new_body_is_not_in_the_header_answer_but_its_length_is() -> None:
    common = answered(SetDestination(Part.HEADERS, Steer("f", "a:1", body=b"four"))).request_headers.response
    assert not common.HasField("body_mutation")
    assert set_headers(common.header_mutation) == {"content-length": b"4"}


def test_the_pool_selects_the_route_again() -> None:
    common = answered(SetDestination(Part.BODY, Steer("f", "a:1", pool="big"))).request_body.response
    assert set_headers(common.header_mutation) == {"x-extproc-pool": b"big"}
    assert common.clear_route_cache


def test_the_rank_is_told_by_header() -> None:
    common = answered(SetDestination(Part.BODY, Steer("f", "a:1", rank=0))).request_body.response
    assert set_headers(common.header_mutation) == {"x-data-parallel-rank": b"0"}


def test_who_computes_the_prompt_is_told_by_header() -> None:
    common = answered(SetDestination(Part.BODY, Steer("f", "a:1", prefiller="b:2"))).request_body.response
    assert set_headers(common.header_mutation) == dict.fromkeys(names.PREFILLER_HEADERS, b"b:2")


def test_a_copy_and_how_often_another_is_tried() -> None:
    response = answered(SetDestination(Part.BODY, Steer("f", "a:1,c:3", mirror="b:2", retries=1)))
    common = response.request_body.response
    assert set_headers(common.header_mutation) == {names.MIRROR_HEADER: b"1", names.RETRIES_HEADER: b"1"}
    assert common.clear_route_cache
    assert response.dynamic_metadata["extproc"] == {"flight": "f", "prefiller": "b:2"}


@pytest.mark.parametrize("prefiller", ["", "b:2"])
def test_nobody_else_tells_the_side_car_anything(prefiller: str) -> None:
    mutation = answered(
        SetDestination(Part.BODY, Steer("f", "a:1", prefiller=prefiller))
    ).request_body.response.header_mutation
    assert {*mutation.remove_headers, *set_headers(mutation)} == set(names.SIDECAR_HEADERS)
    common = answered(SetDestination(Part.BODY, Steer("f", "a:1"))).request_body.response
    assert not common.header_mutation.remove_headers


def test_a_pick_with_trailers() -> None:
    response = answered(SetDestination(Part.TRAILERS, Steer("f", "a:1")))
    assert response.WhichOneof("response") == "request_trailers"
    assert response.dynamic_metadata["extproc"] == {"flight": "f"}


@pytest.mark.parametrize("part", [Part.BODY, Part.RESPONSE_BODY])
def test_an_echo_is_a_streamed_response(part: Part) -> None:
    response = answered(EchoBody(b"x", end_of_stream=True, part=part))
    assert response.WhichOneof("response") == part.value
    piece = getattr(response, part.value).response.body_mutation.streamed_response
    assert (piece.body, piece.end_of_stream) == (b"x", True)


@pytest.mark.parametrize("status", [429, 418])
def test_an_error_is_an_immediate_response(status: int) -> None:
    error = HttpError(status, b"{}", (("content-type", "application/json"), ("retry-after", "1")))
    immediate = answered(Respond(error)).immediate_response
    assert (immediate.status.code, immediate.body, immediate.details) == (status, b"{}", "extproc")
    assert set_headers(immediate.headers) == {"content-type": b"application/json", "retry-after": b"1"}


def test_a_command_that_is_not_for_the_proxy_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        codec.answer(CLOSE)


# --- access log -------------------------------------------------------------------------------------------------------


def entry(**fields: Any) -> HTTPAccessLogEntry:
    made = HTTPAccessLogEntry(common_properties=fields)
    made.common_properties.metadata.filter_metadata["extproc"].update({"flight": "f"})
    return made


def logged(made: HTTPAccessLogEntry) -> codec.LogEntry:
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.append(made)
    (one,) = codec.log_entries(message.SerializeToString())
    return one


@pytest.mark.parametrize(
    ("host", "port", "served"), [("10.0.0.1", 80, "10.0.0.1:80"), ("::1", 80, "[::1]:80"), ("x", 0, None)]
)
def test_without_a_note_the_connection_tells_who_served(host: str, port: int, served: str | None) -> None:
    address = {"socket_address": {"address": host, "port_value": port}}
    assert logged(entry(upstream_remote_address=address)).served == served


def test_the_connection_tells_who_served_before_a_note_of_who_was_asked() -> None:
    made = entry()
    key = "x-gateway-destination-endpoint-served"
    made.common_properties.metadata.filter_metadata["envoy.lb"].update({key: "10.0.0.2:2"})
    assert logged(made).served == "10.0.0.2:2"
    made.common_properties.upstream_remote_address.socket_address.address = "10.0.0.1"
    made.common_properties.upstream_remote_address.socket_address.port_value = 1
    assert logged(made).served == "10.0.0.1:1"


@pytest.mark.parametrize(
    ("value", "count"),
    [(3, 3), (0, 0), ("17", 17), ("", None), ("x", None), (-1, None), (1e30, None), (True, None), (None, None)],
)
def test_token_counts_come_as_numbers_or_text(value: Any, count: int | None) -> None:
    made = entry()
    made.common_properties.metadata.filter_metadata["extproc.usage"].update({"prompt_tokens": value})
    assert logged(made).prompt_tokens == count
    assert logged(made).completion_tokens is None


def test_duration_of_proxies_that_lack_the_field() -> None:
    assert logged(entry()).duration_s is None
    assert logged(entry(time_to_last_downstream_tx_byte={"seconds": 2, "nanos": 500_000_000})).duration_s == 2.5
    both = entry(duration={"seconds": 3}, time_to_last_downstream_tx_byte={"seconds": 2})
    assert logged(both).duration_s == 3.0


def test_an_entry_without_our_flight() -> None:
    assert logged(HTTPAccessLogEntry()).flight is None


def test_an_unreadable_access_log_message() -> None:
    with pytest.raises(codec.Unreadable):
        codec.log_entries(b"\xff")


# --- patience, and failures under 200 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience_s", "sent"), [(None, None), (12.3456, b"12346"), (0.0001, b"1")], ids=["none", "rounded", "not zero"]
)
def test_patience_goes_as_a_header_in_milliseconds(patience_s: float | None, sent: bytes | None) -> None:
    message = answered(SetDestination(Part.BODY, Steer("f", "10.0.0.1:80", patience_s=patience_s)))
    headers = {h.header.key: h.header.raw_value for h in message.request_body.response.header_mutation.set_headers}
    assert headers.get("x-envoy-upstream-rq-per-try-timeout-ms") == sent


def test_a_gateway_of_others_is_not_told_of_patience() -> None:
    """It may try no other replica, and then the end of patience is an error for the client."""
    message = answered(SetDestination(Part.HEADERS, Steer("f", "10.0.0.1:80", patience_s=5.0), in_header=True))
    keys = [h.header.key for h in message.request_headers.response.header_mutation.set_headers]
    assert keys == ["x-gateway-destination-endpoint"]


@pytest.mark.parametrize(("value", "broken"), [(True, True), (False, False), ("true", False), (None, False)])
def test_a_failure_under_200_is_read(value: Any, broken: bool) -> None:
    entry = HTTPAccessLogEntry()
    metadata = entry.common_properties.metadata.filter_metadata
    metadata["extproc"].update({"flight": "f1"})
    metadata["extproc.usage"].update({"prompt_tokens": 3, "broken": value})
    message = StreamAccessLogsMessage()
    message.http_logs.log_entry.append(entry)
    [read] = codec.log_entries(message.SerializeToString())
    assert (read.broken, read.prompt_tokens) == (broken, 3)


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_claims_come_as_plain_values() -> None:
    message = request()
    payload: dict[str, Any] = {"jwt_payload": {"sub": "acme", "org": {"id": "x"}, "roles": ["a"], "exp": 12.0}}
    message.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"].update(payload)
    assert headers_of(message).head.claims == payload
    assert headers_of(request()).head.claims is None


def test_what_is_left_to_a_tenant_goes_into_our_metadata() -> None:
    left = (("x-ratelimit-limit-requests", "10"), ("x-ratelimit-reset-requests", "6s"))
    response = answered(SetDestination(Part.BODY, Steer("f1", "10.0.0.1:80", ratelimit=left)))
    ours = response.dynamic_metadata.fields["extproc"].struct_value.fields
    assert {key: ours[key].string_value for key, _ in left} == dict(left)
    assert set(ours) == {"flight", "x-ratelimit-limit-requests", "x-ratelimit-reset-requests"}


def test_the_head_of_a_response_tells_its_status_and_who_served() -> None:
    message = ProcessingRequest(response_headers={"end_of_stream": True})
    header = message.response_headers.headers.headers.add()
    header.key, header.raw_value = ":status", b"503"
    assert codec.event(message.SerializeToString()) == ResponseArrived(
        Part.RESPONSE_HEADERS, end_of_stream=True, status=503
    )
    message.metadata_context.filter_metadata["envoy.lb"].fields[
        "x-gateway-destination-endpoint-served"
    ].string_value = "10.0.0.1:8000"
    header.raw_value = b"odd"
    assert codec.event(message.SerializeToString()) == ResponseArrived(
        Part.RESPONSE_HEADERS, end_of_stream=True, served="10.0.0.1:8000"
    )


def test_headers_of_an_undecided_request_lose_a_destination_of_the_client() -> None:
    answer = ProcessingResponse.FromString(codec.answer(Continue(Part.HEADERS, unpicked=True)))
    assert answer.request_headers.response.header_mutation.remove_headers == ["x-gateway-destination-endpoint"]
