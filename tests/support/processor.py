"""A gRPC server of a few lines in the place of extproc: ext_proc, access log and health."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import grpc

from extproc.pb.envoy.data.accesslog.v3 import accesslog_pb2
from extproc.pb.envoy.service.accesslog.v3 import als_pb2
from extproc.pb.envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
ACCESS_LOG = "envoy.service.accesslog.v3.AccessLogService"
HEALTH = "grpc.health.v1.Health"

Answer = Callable[[dict[str, str], bytes], ext_proc.ProcessingResponse]
"""Request headers and body -> the answer to the body message."""


class Processor:
    """Answers headers with nothing and bodies as the test says; keeps the headers and access log entries it saw."""

    def __init__(self, at: str, answer: Answer) -> None:
        """`at` is `ip:port` or `unix:/path`."""
        self.at = at
        self.headers: list[dict[str, str]] = []
        self.entries: list[accesslog_pb2.HTTPAccessLogEntry] = []
        self._answer = answer
        self._server: Any = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
        self._server.add_generic_rpc_handlers(
            (
                _service(EXT_PROC, "Process", _stream_stream(self._process, ext_proc.ProcessingRequest)),
                _service(ACCESS_LOG, "StreamAccessLogs", _stream_unary(self._log, als_pb2.StreamAccessLogsMessage)),
                _service(HEALTH, "Check", _unary_unary(_serving)),
            )
        )
        self._server.add_insecure_port(self.at)
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._server.stop(0)

    async def _process(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        headers: dict[str, str] = {}
        async for message in messages:
            if message.HasField("request_headers"):
                headers = {h.key: h.raw_value.decode() for h in message.request_headers.headers.headers}
                self.headers.append(headers)
                yield ext_proc.ProcessingResponse(request_headers=ext_proc.HeadersResponse())
                if message.request_headers.end_of_stream:
                    return
            else:
                yield self._answer(headers, message.request_body.body)
                return

    async def _log(self, messages: AsyncIterator[Any], context: Any) -> bytes:
        async for message in messages:
            self.entries.extend(message.http_logs.log_entry)
        return b""


async def _serving(request: bytes, context: Any) -> bytes:
    return b"\x08\x01"


def _service(name: str, method: str, handler: Any) -> Any:
    return grpc.method_handlers_generic_handler(name, {method: handler})  # type: ignore[no-untyped-call]


def _stream_stream(handler: Any, request: Any) -> Any:
    return grpc.stream_stream_rpc_method_handler(handler, request.FromString, _bytes)  # type: ignore[no-untyped-call]


def _stream_unary(handler: Any, request: Any) -> Any:
    return grpc.stream_unary_rpc_method_handler(handler, request.FromString)  # type: ignore[no-untyped-call]


def _unary_unary(handler: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(handler)  # type: ignore[no-untyped-call]


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
