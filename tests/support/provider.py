"""An OpenAI-compatible API elsewhere, as extproc's providers are: over TLS, by name, with a key, and with the headers that such APIs send.

    async with Provider(tmp_path, key="sk-1") as provider:
        config = {"providers": [provider.section("openai", api_key_file="openai.key")]}

It is strict where the real ones are: 401 without its key, 404 for paths and models that it does not have, usage in streams only when asked for.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web

from tests.support.backend import Received
from tests.support.ports import free_port

HOST: Final = "localhost"
MODEL: Final = "big-1"
PROMPT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS = 11, 3, 2
TEXT: Final = "from elsewhere"
ACCOUNT: Final = "org-of-ours"

HEADERS: Final = {
    "alt-svc": 'h3=":443"; ma=86400',
    "strict-transport-security": "max-age=31536000",
    "set-cookie": "__bm=1; path=/",
    "openai-organization": ACCOUNT,
    "x-ratelimit-remaining-requests": "9999",
    "x-request-id": "req_1",
}
"""With each answer: what is between the provider and its account, but for the last."""

USAGE: Final = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": OUTPUT_TOKENS,
    "total_tokens": PROMPT_TOKENS + OUTPUT_TOKENS,
    "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


class Provider:
    """Listens for the length of a block. What tests change while it runs: `fail_with`, `failure`, `held`, `drops`, `cuts`, `key` and its header."""

    def __init__(self, directory: Path, key: str | None = None, *, tls: bool = True, base: str = "/v1") -> None:
        """`directory` gets its certificate; without `key` it wants none; `base` stands before all its paths."""
        self.port = free_port()
        self.key = key
        self.base = base
        self.received: list[Received] = []
        """All requests, refused ones too."""
        self.fail_with: int | None = None
        """Status of all answers."""
        self.failure = web.Response(text=f"<html>{ACCOUNT}</html>", content_type="text/html")
        """Headers and body of those."""
        self.key_header = "authorization"
        self.drops = False
        """Connections are reset where an answer is due."""
        self.cuts = False
        """Streams break off after their first event."""
        self.held: asyncio.Event | None = None
        """Nothing is answered before it is set."""
        self._tls = certificate(directory, HOST) if tls else None
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<provider {self.port}, {len(self.received)} requests>"

    @property
    def ca_file(self) -> Path | None:
        """Who trusts this trusts it."""
        return self._tls

    def section(self, name: str, **more: Any) -> dict[str, Any]:
        """It as an entry of `providers`."""
        tls = {"tls": False} if self._tls is None else {"ca_file": str(self._tls)}
        return {
            "name": name,
            "host": HOST,
            "port": self.port,
            "model": MODEL,
            "base_path": self.base,
            **tls,
            **more,
        }

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, again after `stop`."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=_context(self._tls)).start()

    async def stop(self) -> None:
        """Refuse connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = await request.read()
        self.received.append(Received(request.method, request.path_qs, headers, body))
        if self.held is not None:
            await self.held.wait()
        if self.drops and request.transport is not None:
            request.transport.abort()
        if self.fail_with is not None:
            headers = {**HEADERS, **self.failure.headers}
            headers.pop("content-length", None)
            failed = web.Response(status=self.fail_with, body=self.failure.body, headers=headers)
            failed.enable_chunked_encoding()  # as gateways in front of such APIs answer
            return failed
        if self.key is not None and headers.get(self.key_header, "").removeprefix("Bearer ") != self.key:
            return _error(401, f"Incorrect API key provided: {self.key}.", "invalid_api_key")
        asked = json.loads(body or b"{}")
        if request.path != f"{self.base}/chat/completions" or asked.get("model") != MODEL:
            return _error(404, "The model does not exist.", "model_not_found")
        if asked.get("stream"):
            usage = (asked.get("stream_options") or {}).get("include_usage", False)
            return await self._streamed(request, _events(usage))
        return web.json_response(answer(), headers=HEADERS, dumps=lambda value: json.dumps(value, indent=2))

    async def _streamed(self, request: web.Request, events: Iterator[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse(headers={**HEADERS, "content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.cuts and request.transport is not None:
                request.transport.close()
                return response
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def certificate(directory: Path, name: str) -> Path:
    """A certificate for this name that vouches for itself: `NAME.pem`, with its key. Needs the command openssl."""
    path, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", path],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + key.read_text())
    return path


def answer() -> dict[str, Any]:
    """An answer that is not streamed."""
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": USAGE}


def _context(tls: Path | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls)
    return context


def _error(status: int, message: str, code: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=HEADERS)


def _events(usage: bool) -> Iterator[dict[str, Any]]:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL}
    told = {"usage": None} if usage else {}
    for piece in TEXT.split(" "):
        yield {**base, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}], **told}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **told}
    if usage:
        yield {**base, "choices": [], "usage": USAGE}
