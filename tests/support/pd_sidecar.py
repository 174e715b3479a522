"""llm-d's side-car in a few lines: what stands beside a replica that decodes, and has the prompt computed elsewhere first.

The protocol is that of its connector `nixlv2`: the prompt goes with `max_tokens: 1` and without streaming to the address in
`x-prefiller-host-port`, and what that says of its KV cache (`kv_transfer_params`) goes with the request to the replica. An error there is
the answer. Without the header the request passes.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

HEADER = "x-prefiller-host-port"
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}

Decode = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def sidecar(decode: Decode) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A handler. `decode` gets the request and the body that the replica would get."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        prefiller = request.headers.get(HEADER)
        if prefiller is None:
            return await decode(request, body)
        prompt = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASKED}
        prompt.pop("stream_options", None)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{prefiller}{request.path}", json=prompt) as answer,
        ):
            if answer.status >= 300:
                return web.Response(status=answer.status)
            held = (await answer.json())["kv_transfer_params"]
        return await decode(request, {**body, "kv_transfer_params": held})

    return handle
