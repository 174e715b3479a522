"""Between protobuf on the wire and our own values; the only importer of `extproc.pb`.

Bytes come in and go out, so that gRPC itself parses nothing and a message that does not parse is ours to handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct, Value

from extproc.core.record import record
from extproc.envoy import wire
from extproc.envoy.exchange import (
    AskForTime,
    BodyArrived,
    Command,
    Content,
    Continue,
    EchoBody,
    Event,
    Head,
    HeadersArrived,
    Mode,
    Part,
    Respond,
    ResponseArrived,
    SetDestination,
    TrailersArrived,
)
from extproc.envoy.names import (
    BROKEN,
    CACHED_TOKENS,
    COMPLETION_TOKENS,
    DESTINATION,
    FLIGHT,
    JWT_NAMESPACE,
    LB_NAMESPACE,
    MIRROR_HEADER,
    NAMESPACE,
    PATIENCE_HEADER,
    POOL_HEADER,
    PREFILLER,
    PREFILLER_HEADERS,
    PROMPT_TOKENS,
    RANK_HEADER,
    REFUSED_DETAILS,
    REPLICA_TTFT_TAG,
    RETRIES_HEADER,
    SERVED,
    SIDECAR_HEADERS,
    STRIP_USAGE,
    SUBSET,
    SUBSET_NAMESPACE,
    TTFT_TAG,
    USAGE_NAMESPACE,
)
from extproc.pb.envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from extproc.pb.envoy.data.accesslog.v3 import accesslog_pb2 as log_pb
from extproc.pb.envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from extproc.pb.grpc.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

# --- ext_proc: in -----------------------------------------------------------------------------------------------------

ALWAYS = frozenset({":method", ":path", "content-length"})
"""Headers read of every request."""
OF_RESPONSE = frozenset({":status", "content-type", "content-encoding"})
"""Headers read of every response that goes through us."""

MODES = {
    0: Mode.NONE,
    1: Mode.STREAMED,
    2: Mode.BUFFERED,
    3: Mode.BUFFERED_PARTIAL,
    4: Mode.FULL_DUPLEX,
    5: Mode.GRPC,
}
"""ProcessingMode.BodySendMode; one that a newer proxy may add is taken for NONE: nothing of its body can be relied on."""

LARGE_BYTES = 256 * 1024
"""Messages above are not parsed when they bring a body."""
TRAILERS_ARRIVED = TrailersArrived()
FULL_DUPLEX = 4


class Unreadable(Exception):  # noqa: N818 - says what the message is
    """The bytes are not a message of this protocol."""


def event(raw: bytes, wanted: frozenset[str] = ALWAYS) -> Event:
    """One ProcessingRequest. `wanted` names the headers to keep, lower case. Raises Unreadable.

    A message above `LARGE_BYTES` keeps its body in place: the event has a view of `raw`.
    """
    if len(raw) > LARGE_BYTES and (found := wire.request_body(raw)) is not None:
        return BodyArrived(*found)
    try:
        request = pb.ProcessingRequest.FromString(raw)
    except DecodeError as e:
        raise Unreadable(f"ProcessingRequest of {len(raw)} bytes: {e}") from None
    kind = request.WhichOneof("request")
    if kind == "request_body":
        body = request.request_body
        return BodyArrived(body.body, body.end_of_stream)
    if kind == "request_headers":
        end, mode, duplex = request.request_headers.end_of_stream, _mode(request), _duplex_response(request)
        usage_is_read = mode is not Mode.FULL_DUPLEX or duplex
        head = _head(request, wanted, usage_is_read, mirrors=mode is Mode.BUFFERED)
        return HeadersArrived(head, end, mode, duplex)
    if kind == "request_trailers":
        return TRAILERS_ARRIVED
    if kind is None:
        raise Unreadable("ProcessingRequest about nothing that we know")
    if kind == "response_headers":
        return _response_headers(request)
    body = request.response_body  # empty for trailers
    return ResponseArrived(Part(kind), body.body, body.end_of_stream, _duplex_response(request))


def _response_headers(request: pb.ProcessingRequest) -> ResponseArrived:
    message = request.response_headers
    said = {h.key: _header_value(h) for h in message.headers.headers if h.key in OF_RESPONSE}
    status, served = said.get(":status", ""), None
    if request.HasField("metadata_context"):
        served = _value(request.metadata_context.filter_metadata, LB_NAMESPACE, SERVED)
    return ResponseArrived(
        Part.RESPONSE_HEADERS,
        end_of_stream=message.end_of_stream,
        duplex=_duplex_response(request),
        status=int(status) if status.isdecimal() and len(status) == 3 else None,
        served=served.string_value or None if served is not None else None,
        content=_content(said),
    )


def _content(headers: Mapping[str, str]) -> Content:
    """As what the body of a response can be read."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if headers.get("content-encoding", "identity") != "identity":
        return Content.OTHER
    return {"text/event-stream": Content.STREAM, "application/json": Content.JSON}.get(kind, Content.OTHER)


def _header_value(header: HeaderValue) -> str:
    return header.raw_value.decode("utf-8", "replace") or header.value


def _head(request: pb.ProcessingRequest, wanted: frozenset[str], usage_is_read: bool, mirrors: bool) -> Head:
    found: dict[str, str] = {}
    for header in request.request_headers.headers.headers:
        if (key := header.key) in wanted:
            value = _header_value(header)
            # One that comes twice is one with a comma (RFC 9110, 5.3): were the last to count, a client could hide another behind it.
            found[key] = f"{found[key]},{value}" if key in found else value
    length = found.get("content-length", "")
    told = request.HasField("metadata_context")
    return Head(
        method=found.get(":method", ""),
        path=found.get(":path", ""),
        content_length=int(length) if length.isdecimal() and len(length) < 20 else None,
        headers=found,
        subset=_subset(request) if told else None,
        claims=_claims(request) if told else None,
        usage_is_read=usage_is_read,
        mirrors=mirrors,
    )


def _claims(request: pb.ProcessingRequest) -> dict[str, Any] | None:
    """What the proxy's JWT filter left, as plain values."""
    payloads = request.metadata_context.filter_metadata.get(JWT_NAMESPACE)
    return None if payloads is None else MessageToDict(payloads)


def _mode(request: pb.ProcessingRequest) -> Mode:
    if not request.HasField("protocol_config"):
        return Mode.UNTOLD
    config = request.protocol_config
    mode = MODES.get(config.request_body_mode, Mode.NONE)
    early = mode is Mode.STREAMED and config.send_body_without_waiting_for_header_response
    return Mode.STREAMED_EARLY if early else mode


def _duplex_response(request: pb.ProcessingRequest) -> bool:
    return request.protocol_config.response_body_mode == FULL_DUPLEX


def _subset(request: pb.ProcessingRequest) -> frozenset[str] | None:
    """The endpoints that a gateway allows: a list, or text with commas. A hint that names none allows none."""
    hint = _value(request.metadata_context.filter_metadata, SUBSET_NAMESPACE, SUBSET)
    if hint is None:
        return None
    texts = [v.string_value for v in hint.list_value.values] or [hint.string_value]
    return frozenset(part for text in texts for piece in text.split(",") if (part := piece.strip()))


def _value(metadata: Mapping[str, Struct], namespace: str, key: str) -> Value | None:
    """One value of dynamic metadata. By `get`: reading a protobuf map at a missing key would add it."""
    values = metadata.get(namespace)
    return None if values is None else values.fields.get(key)


# --- ext_proc: out ----------------------------------------------------------------------------------------------------


def _continues() -> Iterable[tuple[Part, bytes]]:
    for part in Part:
        response = pb.ProcessingResponse()
        getattr(response, part.value).SetInParent()
        yield part, response.SerializeToString()


CONTINUES = dict(_continues())
"""The answers that change nothing."""


def answer(command: Command) -> bytes:
    """One ProcessingResponse. Raises KeyError for commands that are not for the proxy."""
    return WRITERS[type(command)](command)


def _unpicked() -> bytes:
    response = pb.ProcessingResponse()
    response.request_headers.response.header_mutation.remove_headers.append(DESTINATION)
    return response.SerializeToString()


UNPICKED = _unpicked()
"""The answer to headers that changes nothing, but takes away a destination that is not ours."""


def _continue(command: Continue) -> bytes:
    return UNPICKED if command.unpicked else CONTINUES[command.part]


def _set_destination(command: SetDestination) -> bytes:
    steer = command.steer
    large = steer.body if command.part is Part.BODY and len(steer.body or b"") > LARGE_BYTES else None
    response = pb.ProcessingResponse()
    getattr(response, command.part.value).SetInParent()
    if command.part is Part.HEADERS:
        _change(response.request_headers.response, command)
    elif command.part is Part.BODY:
        _change(response.request_body.response, command)
        if steer.body is not None and large is None:
            response.request_body.response.body_mutation.body = steer.body
    metadata = response.dynamic_metadata.fields
    if steer.destination != "":  # empty for a provider
        metadata[LB_NAMESPACE].struct_value.fields[DESTINATION].string_value = steer.destination
    ours = metadata[NAMESPACE].struct_value.fields
    ours[FLIGHT].string_value = steer.flight
    if steer.mirror is not None:
        ours[PREFILLER].string_value = steer.mirror
    if steer.strip_usage:
        ours[STRIP_USAGE].bool_value = True
    for key, value in steer.ratelimit:
        ours[key].string_value = value
    if large is None:
        return response.SerializeToString()
    return wire.with_new_body(response.SerializeToString(), large)


def _change(common: pb.CommonResponse, command: SetDestination) -> None:
    """The request headers that go with the pick."""
    steer, mutation = command.steer, common.header_mutation
    if command.in_header and steer.destination:
        _set_header(mutation, DESTINATION, steer.destination)
    elif steer.patience_s is not None:  # other people's gateways may have no retry to follow
        _set_header(mutation, PATIENCE_HEADER, str(max(1, round(steer.patience_s * 1e3))))
    if steer.rank is not None:
        _set_header(mutation, RANK_HEADER, str(steer.rank))
    if steer.prefiller is not None:
        _tell_sidecar(mutation, steer.prefiller)
    if steer.mirror is not None:
        _set_header(mutation, MIRROR_HEADER, "1")
        common.clear_route_cache = True
    if steer.retries is not None:
        _set_header(mutation, RETRIES_HEADER, str(steer.retries))
    if steer.pool is not None:
        _set_header(mutation, POOL_HEADER, steer.pool)
        common.clear_route_cache = True
    if steer.body is not None:  # a stale length makes Envoy answer 500
        _set_header(mutation, "content-length", str(len(steer.body)))


def _tell_sidecar(mutation: pb.HeaderMutation, prefiller: str) -> None:
    """Who computes the prompt; empty where nobody but the replica does. Under other people's gateways what a client wrote is still there."""
    if prefiller:
        for name in PREFILLER_HEADERS:
            _set_header(mutation, name, prefiller)
    mutation.remove_headers.extend(name for name in SIDECAR_HEADERS if not prefiller or name not in PREFILLER_HEADERS)


def _set_header(mutation: pb.HeaderMutation, key: str, value: str) -> None:
    option = mutation.set_headers.add()
    option.append_action = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    option.header.key = key
    option.header.raw_value = value.encode()


def _echo_body(command: EchoBody) -> bytes:
    response = pb.ProcessingResponse()
    body = response.request_body if command.part is Part.BODY else response.response_body
    piece = body.response.body_mutation.streamed_response
    piece.body = bytes(command.data)  # costs nothing where it is bytes
    piece.end_of_stream = command.end_of_stream
    return response.SerializeToString()


def _ask_for_time(command: AskForTime) -> bytes:
    response = pb.ProcessingResponse()
    response.override_message_timeout.FromNanoseconds(round(command.up_to_s * 1e9))
    return response.SerializeToString()


def _respond(command: Respond) -> bytes:
    error = command.error
    response = pb.ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = error.status  # type: ignore[assignment]  # an open enum
    immediate.body = error.body
    immediate.details = REFUSED_DETAILS
    for key, value in error.headers:
        _set_header(immediate.headers, key, value)
    return response.SerializeToString()


WRITERS: Mapping[type[Command], Callable[[Any], bytes]] = {  # each takes the command under which it stands
    AskForTime: _ask_for_time,
    Continue: _continue,
    SetDestination: _set_destination,
    EchoBody: _echo_body,
    Respond: _respond,
}


# --- access log -------------------------------------------------------------------------------------------------------


@record
class LogEntry:
    """One HTTPAccessLogEntry, without interpretation. Numbers that the proxy did not give are None."""

    flight: str | None
    """None for requests that were not routed by us."""
    kind: int = 0
    """AccessLogType."""
    intermediate: bool = False
    status: int | None = None
    flags: tuple[str, ...] = ()
    """Names of the ResponseFlags that are set."""
    served: str | None = None
    """`ip:port` that answered, or was tried last."""
    attempts: int | None = None
    ttft_us: str | None = None
    replica_ttft_us: str | None = None
    duration_s: float | None = None
    response_bytes: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    broken: bool = False
    """The response said under status 200 that it failed."""


def log_entries(raw: bytes) -> list[LogEntry]:
    """The HTTP entries of one StreamAccessLogsMessage. Raises Unreadable."""
    try:
        message = StreamAccessLogsMessage.FromString(raw)
    except DecodeError as e:
        raise Unreadable(f"StreamAccessLogsMessage of {len(raw)} bytes: {e}") from None
    return [_log_entry(entry) for entry in message.http_logs.log_entry]


def _log_entry(entry: log_pb.HTTPAccessLogEntry) -> LogEntry:
    common = entry.common_properties
    metadata = common.metadata.filter_metadata
    flight = _value(metadata, NAMESPACE, FLIGHT)
    if flight is None or not flight.string_value:
        return LogEntry(None)
    response, tags = entry.response, common.custom_tags
    return LogEntry(
        flight=flight.string_value,
        kind=common.access_log_type,
        intermediate=common.intermediate_log_entry,
        status=response.response_code.value or None,
        flags=tuple(field.name for field, _ in common.response_flags.ListFields()),
        served=_served(common),
        attempts=common.upstream_request_attempt_count or None,
        ttft_us=tags.get(TTFT_TAG),
        replica_ttft_us=tags.get(REPLICA_TTFT_TAG),
        duration_s=_duration_s(common),
        response_bytes=response.response_body_bytes,
        prompt_tokens=_count(metadata, PROMPT_TOKENS),
        completion_tokens=_count(metadata, COMPLETION_TOKENS),
        cached_tokens=_count(metadata, CACHED_TOKENS),
        broken=_is_set(metadata, BROKEN),
    )


def _served(common: log_pb.AccessLogCommon) -> str | None:
    """By its connection. The note names who was asked last, and of two that were asked the first may answer (Envoy 1.40)."""
    socket = common.upstream_remote_address.socket_address
    if socket.port_value:
        host = f"[{socket.address}]" if ":" in socket.address else socket.address
        return f"{host}:{socket.port_value}"
    noted = _value(common.metadata.filter_metadata, LB_NAMESPACE, SERVED)
    return noted.string_value or None if noted is not None else None


def _duration_s(common: log_pb.AccessLogCommon) -> float | None:
    if common.HasField("duration"):
        span = common.duration
    elif common.HasField("time_to_last_downstream_tx_byte"):
        span = common.time_to_last_downstream_tx_byte
    else:
        return None
    return span.seconds + span.nanos / 1e9


def _count(metadata: Mapping[str, Struct], key: str) -> int | None:
    """A number of tokens; Envoy hands JSON numbers on as doubles, or as text where it is told so."""
    value = _value(metadata, USAGE_NAMESPACE, key)
    if value is None:
        return None
    if value.WhichOneof("kind") == "number_value":
        number = value.number_value
        return int(number) if 0 <= number < 2**53 else None
    text = value.string_value
    return int(text) if text.isdecimal() and len(text) < 16 else None


def _is_set(metadata: Mapping[str, Struct], key: str) -> bool:
    value = _value(metadata, USAGE_NAMESPACE, key)
    return value is not None and value.bool_value


# --- health -----------------------------------------------------------------------------------------------------------

SERVING = HealthCheckResponse(status=HealthCheckResponse.SERVING).SerializeToString()
NOT_SERVING = HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING).SerializeToString()
SERVICE_UNKNOWN = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()


def health_service(raw: bytes) -> str:
    """The name that a HealthCheckRequest asks about. Raises Unreadable."""
    try:
        return HealthCheckRequest.FromString(raw).service
    except DecodeError as e:
        raise Unreadable(f"HealthCheckRequest of {len(raw)} bytes: {e}") from None
