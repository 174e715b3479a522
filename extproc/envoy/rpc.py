"""The few things used of grpc.aio, which ships no types, with types. Messages are bytes both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc as untyped

grpc: Any = untyped
EOF: Any = grpc.aio.EOF
NOT_FOUND: Any = grpc.StatusCode.NOT_FOUND
INVALID_ARGUMENT: Any = grpc.StatusCode.INVALID_ARGUMENT
RESOURCE_EXHAUSTED: Any = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE: Any = grpc.StatusCode.UNAVAILABLE

Service = Any  # grpc.GenericRpcHandler


class Context(Protocol):
    """One RPC, as its handler sees it. A cancelled RPC cancels the task of its handler."""

    async def read(self) -> Any:
        """The next message, or EOF."""

    async def write(self, message: bytes) -> None:
        """Send one message; returns when gRPC has taken it."""

    async def abort(self, code: Any, details: str) -> None:
        """End with an error; raises to leave the handler."""


def unary(handler: Callable[[bytes, Context], Awaitable[bytes]]) -> Any:
    """One message in, one out."""
    return grpc.unary_unary_rpc_method_handler(handler)


def server_stream(handler: Callable[[bytes, Context], AsyncIterator[bytes]]) -> Any:
    """One message in, several out."""
    return grpc.unary_stream_rpc_method_handler(handler)


def client_stream(handler: Callable[[Any, Context], Awaitable[bytes]]) -> Any:
    """Several messages in, one out."""
    return grpc.stream_unary_rpc_method_handler(handler)


def both_stream(handler: Callable[[Any, Context], Awaitable[None]]) -> Any:
    """Reads and writes as it likes."""
    return grpc.stream_stream_rpc_method_handler(handler)


def service(name: str, methods: dict[str, Any]) -> Service:
    """A service by its full name, without generated stubs."""
    return grpc.method_handlers_generic_handler(name, methods)


def server(services: list[Service], max_message_bytes: int) -> Any:
    """A grpc.aio server. Ports are not shared, so that a second process on one is an error and not half the traffic."""
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),
        # Envoy pings every half second. gRPC takes that for abuse by default, and ends the connection with all of its streams.
        ("grpc.http2.max_ping_strikes", 0),
        # A proxy that vanishes without a word would keep its streams open, and the flights of those that are followed counted as load, for
        # as long as the kernel believes in the connection: hours. Pings only while there are streams; with these a stopped Envoy was noticed
        # after 85 s (gRPC 1.85).
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    return grpc.aio.server(handlers=services, options=options)
