"""grpc.health.v1: tells proxies and orchestrators whether this process takes requests.

Envoy's health check is the only thing that takes a hung extproc out of the path, and `NOT_SERVING` is how a stopping one leaves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from extproc.envoy import rpc
from extproc.envoy.codec import NOT_SERVING, SERVICE_UNKNOWN, SERVING, Unreadable, health_service

SERVICE = "grpc.health.v1.Health"
NAMES = frozenset({"", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"})
LIVENESS = "liveness"
"""Stays SERVING while stopping: a process that drains is alive, and killing it would cut what it drains."""


class Health:
    """One state for all names."""

    def __init__(self) -> None:
        self._serving = True
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<health {'serving' if self._serving else 'not serving'}>"

    def stop_serving(self) -> None:
        """From now on NOT_SERVING; whoever watches is told, and its stream ends."""
        self._serving = False
        self._changed.set()

    def status(self, name: str) -> bytes:
        """A HealthCheckResponse for one of NAMES."""
        return SERVING if self._serving or name == LIVENESS else NOT_SERVING

    def service(self) -> rpc.Service:
        """For `rpc.server`."""
        return rpc.service(SERVICE, {"Check": rpc.unary(self._check), "Watch": rpc.server_stream(self._watch)})

    async def _check(self, raw: bytes, context: rpc.Context) -> bytes:
        name = _name(raw)
        if name not in NAMES:
            await context.abort(rpc.NOT_FOUND, "no such service here")
        return self.status(name or "")

    async def _watch(self, raw: bytes, _context: rpc.Context) -> AsyncIterator[bytes]:
        name = _name(raw)
        if name not in NAMES:
            yield SERVICE_UNKNOWN
        else:
            yield self.status(name or "")
        if self._serving:
            await self._changed.wait()
            if name in NAMES:
                yield self.status(name or "")


def _name(raw: bytes) -> str | None:
    try:
        return health_service(raw)
    except Unreadable:
        return None
