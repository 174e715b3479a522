"""Replicas of a few kinds, for `lab.replica`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

USAGE = {"prompt_tokens": 21, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}}


def echo(name: str) -> Handler:
    """Tells who answered and what arrived."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {k.lower(): v for k, v in request.headers.items()}
        digest = hashlib.sha256(body).hexdigest()
        return web.json_response({"name": name, "size": len(body), "sha256": digest, "headers": headers})

    return handle


async def completion(request: web.Request) -> web.StreamResponse:
    """A whole response with usage."""
    await request.read()
    return web.json_response({"object": "chat.completion", "choices": [], "usage": USAGE})


def stream(first_s: float = 0.0, gap_s: float = 0.0, chunks: int = 3, breaks: bool = False) -> Handler:
    """A streamed response with usage in its last chunk: headers at once, the first chunk after `first_s` seconds."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(first_s)
        for n in range(chunks):
            await response.write(event({"choices": [{"delta": {"content": f"token {n} "}}]}))
            await asyncio.sleep(gap_s)
        if breaks:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(event({"choices": [], "usage": USAGE}))
        await response.write(b"data: [DONE]\n\n")
        return response

    return handle


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def status(code: int) -> Handler:
    """Nothing but a status."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.json_response({"error": {"message": "no", "type": "t", "param": None, "code": code}}, status=code)

    return handle
