"""Values and objects that the tests with a real Envoy share. Ports 21200-21299."""

from __future__ import annotations

import json
import time
from typing import Any

from extproc.config import Config
from extproc.core.types import Api, Decision, Prediction, Route, Verdict
from extproc.envoy.intake import FakeRouter, Intake
from extproc.envoy.server import Server

LISTEN, ADMIN, SERVICE = 21200, 21201, 21202
A, B, NOBODY = 21211, 21212, 21219
CHAT = "/v1/chat/completions"

SEND = {"request_header_mode": "SEND", "response_header_mode": "SKIP"}
BUFFERED = {**SEND, "request_body_mode": "BUFFERED"}
DUPLEX = {**SEND, "request_body_mode": "FULL_DUPLEX_STREAMED", "request_trailer_mode": "SEND"}
DUPLEX_BOTH = {
    **DUPLEX,
    "response_header_mode": "SEND",
    "response_body_mode": "FULL_DUPLEX_STREAMED",
    "response_trailer_mode": "SEND",
}
STRICT = {
    "disallow_all": True,
    "allow_expression": {"regex": "^(content-length|content-type|retry-after|x-extproc-pool)$"},
}
"""The least that our answers need; without content-length a rewritten body is answered with 500 by Envoy."""


def route(*ports: int, pool: str = "a", flight: str = "f1") -> Route:
    endpoints = tuple(f"127.0.0.1:{p}" for p in ports)
    nothing = Prediction(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    decision = Decision(0.0, flight, pool, None, Api.CHAT, "fixed", "fixed", endpoints, 0, 0.0, nothing, ())
    return Route(flight, endpoints, decision)


def prompt(size: int, **more: Any) -> bytes:
    """A chat request with so many characters."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}], **more}).encode()


def configured(pools: dict[str, list[int]], service: str = f"127.0.0.1:{SERVICE}") -> Config:
    """A configuration with these pools; each serves the model of its own name."""
    return Config.model_validate(
        {
            "listen": {"grpc": service},
            "pools": [
                {"name": name, "models": [name], "replicas": [f"127.0.0.1:{ports[0]}"]} for name, ports in pools.items()
            ],
        }
    )


def served(
    verdicts: list[Verdict], pools: dict[str, list[int]], kind: type[Server] = Server
) -> tuple[FakeRouter, Server]:
    """A server that gives these verdicts; not started."""
    config = configured(pools)
    router = FakeRouter(verdicts)
    return router, kind(config, Intake(router, config), router, time.monotonic)
