"""A replica that costs next to nothing: a canned completion, or a slow stream. `python -m tests.bench.canned PORT`.

A request with `"stream":true` gets one chunk each STREAM_INTERVAL_S, `max_tokens` of them.
"""

from __future__ import annotations

import asyncio
import re
import sys

import uvloop

from tests.bench.http1 import LAST_CHUNK, message_end

STREAM_INTERVAL_S = 1.0

_BODY = (
    b'{"id":"chatcmpl-0","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"It depends on the load."},"finish_reason":"stop"}],"usage":{"prompt_tokens":1024,'
    b'"total_tokens":1030,"completion_tokens":6,"prompt_tokens_details":{"cached_tokens":512}}}'
)
_LIST = b'{"object":"list","data":[{"id":"bench","object":"model"}]}'


def _ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


COMPLETION = _ok(_BODY)
MODELS = _ok(_LIST)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_MAX_TOKENS = re.compile(rb'"max_tokens": *(\d+)')


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_DELTA = _chunk(b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n')
_DONE = _chunk(b"data: [DONE]\n\n") + LAST_CHUNK


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's own class, which is none of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := message_end(self._buffer)) is not None:
            request = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        if b'"stream":true' not in request:
            self._transport.write(MODELS if request.startswith(b"GET /v1/models") else COMPLETION)
            return
        found = _MAX_TOKENS.search(request)
        self._transport.write(STREAM_HEAD)
        self._stream(int(found[1]) if found else 1)

    def _stream(self, left: int) -> None:
        self._transport.write(_DELTA if left else _DONE)
        if left:
            self._timer = asyncio.get_running_loop().call_later(STREAM_INTERVAL_S, self._stream, left - 1)


async def serve(port: int) -> None:
    """Until killed."""
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
