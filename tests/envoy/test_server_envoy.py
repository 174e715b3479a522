"""What the real Envoy does with our answers."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from extproc.config import Config, PoolConfig
from extproc.core.types import Api, Decision, End, Outcome, Prediction, Progressed, Refusal, Reject, Request, Route
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import Server
from tests.envoy import lab

pytestmark = pytest.mark.envoy

LISTEN, ADMIN, SERVICE, SERVICE_2 = 21200, 21201, 21202, 21203
A, B, NOBODY = 21211, 21212, 21219
SEND = {"request_header_mode": "SEND", "response_header_mode": "SKIP"}
BUFFERED = {**SEND, "request_body_mode": "BUFFERED"}
DUPLEX = {
    **SEND,
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
}
STRICT = {
    "disallow_all": True,
    "allow_expression": {"regex": "^(content-length|content-type|retry-after|x-extproc-pool)$"},
}
CHAT = "/v1/chat/completions"


def route(*ports: int, pool: str = "a", flight: str = "f1") -> Route:
    endpoints = tuple(f"127.0.0.1:{p}" for p in ports)
    nothing = Prediction(0, 0.0, 0.0, 0.0, 0.0)
    return Route(
        flight,
        endpoints,
        Decision(0.0, flight, pool, None, Api.CHAT, "fixed", "fixed", endpoints, 0, 0.0, nothing, ()),
    )


class Lab:
    """What a test needs in hand."""

    def __init__(self, session: aiohttp.ClientSession, router: FakeRouter, server: Server) -> None:
        self.session, self.router, self.server = session, router, server
        self.url = f"http://127.0.0.1:{LISTEN}"

    async def post(self, path: str, data: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, parsed body, headers."""
        kind = {"content-type": "application/json", **headers}
        async with self.session.post(self.url + path, data=io.BytesIO(data), headers=kind) as response:
            text = await response.read()
            return response.status, json.loads(text), {k.lower(): v for k, v in response.headers.items()}


def echo(name: str) -> Any:
    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {k.lower(): v for k, v in request.headers.items()}
        tail = body[:400].decode("utf-8", "replace")
        return web.json_response({"name": name, "size": len(body), "headers": headers, "body": tail})

    return handle


@asynccontextmanager
async def running(
    folder: Path,
    verdicts: list[Any],
    processing: dict[str, str],
    flush: str | None = None,
    two: bool = False,
    **more: Any,
) -> AsyncIterator[Lab]:
    pools = {"a": [A, B, NOBODY], "b": [B]} if two else {"a": [A, B, NOBODY]}
    models = {"a": ("m",), "b": ("n",)}
    config = Config(
        listen={"grpc": f"127.0.0.1:{SERVICE}"},  # type: ignore[arg-type]
        pools=tuple(
            PoolConfig(name=p, models=models[p], replicas=(f"127.0.0.1:{ports[0]}",)) for p, ports in pools.items()
        ),  # type: ignore[arg-type]
    )
    router = FakeRouter(verdicts)
    server = Server(config, Intake(router, config), router, time.monotonic)
    bootstrap = lab.bootstrap(LISTEN, ADMIN, SERVICE, pools, lab.ext_proc(processing, **more), flush)
    await server.start()
    try:
        async with lab.replica(A, echo("a")), lab.replica(B, echo("b")), lab.envoy(bootstrap, folder):
            async with aiohttp.ClientSession() as session:
                yield Lab(session, router, server)
    finally:
        await server.stop(0.5)


def prompt(size: int, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}], **more}).encode()


async def test_probe(tmp_path: Path) -> None:
    async with running(tmp_path, [route(B)], BUFFERED, mutation_rules=STRICT) as at:
        for _ in range(4):
            status, body, _h = await at.post(CHAT, prompt(100))
            print(status, body["name"], body["headers"])
        status, body, _h = await at.post(CHAT, prompt(3_000_000))
        print(status, body["name"], body["size"])
        status, body, _h = await at.post(CHAT, prompt(10, stream=True))
        print(
            "rewritten",
            status,
            body["name"],
            body["size"],
            body["body"],
            body["headers"].get("content-length"),
            body["headers"].get("transfer-encoding"),
        )
        status, body, _h = await at.post("/tokenize", b"y" * 500_000)
        print("unread", status, body["name"], body["size"], body["headers"])
        at.router.verdicts[:] = [Reject(Refusal.NO_REPLICAS)]
        print(await at.post(CHAT, prompt(10)))
        print(await at.post(CHAT, b"{"))
        print(at.server.streams, at.server.entries, at.router.finished[-1:])
