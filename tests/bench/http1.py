"""As much HTTP/1.1 as the benchmark's two ends need: where a message ends."""

from __future__ import annotations

import re

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
LAST_CHUNK = b"0\r\n\r\n"


def message_end(buffer: bytes | bytearray) -> int | None:
    """Bytes of the first message in the buffer; None while it is not whole. A chunked one must be the last in it."""
    head = buffer.find(b"\r\n\r\n")
    if head < 0:
        return None
    if found := _LENGTH.search(buffer, 0, head + 2):
        end = head + 4 + int(found[1])
        return end if len(buffer) >= end else None
    if b"chunked" in buffer[:head].lower():
        return len(buffer) if buffer.endswith(LAST_CHUNK) else None
    return head + 4
