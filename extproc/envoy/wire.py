"""The one message that is too large to be parsed: a request body, found in the bytes of its message and not copied out of them.

Protobuf would copy it twice, when it parses and when the field is read: with the message itself three times 32 MB for each such request.
"""

from __future__ import annotations

REQUEST_BODY = 4
"""ProcessingRequest.request_body; 2 to 7 are its other kinds, of which a message has one."""
KINDS = range(2, 8)
BODY, END_OF_STREAM = 1, 2
"""Of HttpBody."""
VARINT, I64, LEN, I32 = 0, 1, 2, 5
"""Wire types (protobuf.dev, Encoding)."""

Span = tuple[int, int]


def request_body(raw: bytes) -> tuple[memoryview, bool] | None:
    """The body and whether it ends the stream, of a ProcessingRequest that is about a body and spelled plainly; None for all others.

    The view keeps the whole message in memory.
    """
    message = _fields(raw, 0, len(raw))
    if message is None or [number for number, _, _ in message if number in KINDS] != [REQUEST_BODY]:
        return None
    start, end = next(span for number, _, span in message if number == REQUEST_BODY)
    body = _fields(raw, start, end)
    if body is None or [kind for number, kind, _ in body if number == BODY] != [LEN]:
        return None
    at = next(span for number, _, span in body if number == BODY)
    ends = [raw[span[0] : span[1]] for number, kind, span in body if number == END_OF_STREAM and kind == VARINT]
    return memoryview(raw)[slice(*at)], bool(ends) and ends[-1] != b"\0"


def _fields(raw: bytes, at: int, end: int) -> list[tuple[int, int, Span]] | None:
    """Number, wire type and place of each; None where they do not fill the space exactly, or are more than a few."""
    found: list[tuple[int, int, Span]] = []
    while at < end and len(found) < 32:
        tag, at = _varint(raw, at, end)
        kind = tag & 7
        if kind == LEN:
            size, at = _varint(raw, at, end)
        elif kind == VARINT:
            size = _varint(raw, at, end)[1] - at
        else:
            size = {I64: 8, I32: 4}.get(kind, end + 1)
        found.append((tag >> 3, kind, (at, at + size)))
        at += size
    return found if at == end else None


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """Its value and the place after it, which is behind the end where it has none."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, end + 1


# --- out --------------------------------------------------------------------------------------------------------------

MUTATION_PATH = (3, 1, 3, 1)
"""ProcessingResponse.request_body, BodyResponse.response, CommonResponse.body_mutation, BodyMutation.body."""


def with_new_body(response: bytes, body: bytes) -> bytes:
    """A ProcessingResponse about the request's body, which replaces it too; one copy.

    Parsers merge a submessage that comes twice (protobuf.dev, Encoding, "Last One Wins").
    """
    head = b""
    for number in reversed(MUTATION_PATH):
        head = bytes([number << 3 | LEN]) + _as_varint(len(head) + len(body)) + head
    return b"".join((response, head, body))


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
