"""A gRPC client that plays the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from extproc.envoy.rpc import EOF, grpc
from extproc.envoy.server import ACCESS_LOG, PROCESSOR
from extproc.pb.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse

ENDED = None
"""What `ask` gives once the server has ended the RPC."""


@asynccontextmanager
async def channel(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as opened:
        yield opened


class Stream:
    """One ext_proc RPC."""

    def __init__(self, opened: Any) -> None:
        self.call = opened.stream_stream(f"/{PROCESSOR}/Process")()

    async def send(self, raw: bytes) -> None:
        await self.call.write(raw)

    async def ask(self, request: ProcessingRequest | None = None) -> ProcessingResponse | None:
        """Send a message, if one is given, and wait for the next answer."""
        if request is not None:
            await self.send(request.SerializeToString())
        raw = await self.call.read()
        return ENDED if raw is EOF else ProcessingResponse.FromString(raw)

    async def code(self) -> str:
        """How the RPC ended."""
        return str((await self.call.code()).name)


def headers(path: str, mode: int | None = 2, end: bool = False, method: str = "POST", **more: str) -> ProcessingRequest:
    message = ProcessingRequest()
    message.request_headers.end_of_stream = end
    pairs = {":method": method, ":path": path, **{k.replace("_", "-"): v for k, v in more.items()}}
    for key, value in pairs.items():
        header = message.request_headers.headers.headers.add()
        header.key, header.raw_value = key, value.encode()
    if mode is not None:
        message.protocol_config.request_body_mode = mode  # type: ignore[assignment]
    return message


def body(data: bytes, end: bool = True) -> ProcessingRequest:
    return ProcessingRequest(request_body={"body": data, "end_of_stream": end})


def log_stream(opened: Any) -> Any:
    return opened.stream_unary(f"/{ACCESS_LOG}/StreamAccessLogs")()
