"""KEDA's external scaler: how many replicas each pool should have, on the port on which Envoy asks.

KEDA lets a workload have replicas while it is active, and an HPA then divides the metric by its target, which is 1: the metric is
the number of replicas. Cooldowns and steps are ours, so the HPA shall have none of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from extproc.envoy import rpc, scaler_codec
from extproc.envoy.codec import Unreadable

SERVICE: Final = "externalscaler.ExternalScaler"
LOOK_S: Final = 0.5
"""Between looks of a stream at whether its pool has become active: part of a cold start of two minutes."""
UNKNOWN: Final = "the members of the pool are not known yet"
MAX_STREAMS: Final = 256
"""Open at one time; KEDA opens one for each ScaledObject."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What a pool should have."""

    replicas: int | None
    """None where it is not known yet: this process has just started."""
    active: bool
    """Whether it shall have any at all."""


Scales = Callable[[str | None], Scale | None]
"""Takes the name of a pool; None for the only one that scales. None where there is no such pool, or it does not scale."""


class Scaler:
    """The service."""

    def __init__(self, scales: Scales) -> None:
        self._scales = scales
        self._closed = asyncio.Event()
        self._streams = 0

    def __repr__(self) -> str:
        return f"<scaler with {self._streams} streams>"

    def close(self) -> None:
        """End the streams, which do not end by themselves."""
        self._closed.set()

    def service(self) -> rpc.Service:
        """For `rpc.server`."""
        return rpc.service(
            SERVICE,
            {
                "IsActive": rpc.unary(self._is_active),
                "StreamIsActive": rpc.server_stream(self._stream),
                "GetMetricSpec": rpc.unary(self._spec),
                "GetMetrics": rpc.unary(self._metrics),
            },
        )

    async def _is_active(self, raw: bytes, context: rpc.Context) -> bytes:
        scale = await self._scale(scaler_codec.pool_of, raw, context)
        if scale.replicas is None and not scale.active:
            await context.abort(rpc.UNAVAILABLE, UNKNOWN)
        return _activity(scale)

    async def _spec(self, raw: bytes, context: rpc.Context) -> bytes:
        await self._scale(scaler_codec.pool_of, raw, context)
        return scaler_codec.SPEC

    async def _metrics(self, raw: bytes, context: rpc.Context) -> bytes:
        scale = await self._scale(scaler_codec.pool_of_metrics, raw, context)
        if scale.replicas is None:
            # Whatever number were told would be taken for the truth, and a fleet be taken down at each restart of ours.
            await context.abort(rpc.UNAVAILABLE, UNKNOWN)
            raise LookupError(UNKNOWN)
        return scaler_codec.value(scale.replicas)

    async def _stream(self, raw: bytes, context: rpc.Context) -> AsyncIterator[bytes]:
        """The state now, and after each change, until KEDA leaves or we stop."""
        if self._streams >= MAX_STREAMS:
            await context.abort(rpc.RESOURCE_EXHAUSTED, f"{MAX_STREAMS} streams are open already")
        self._streams += 1
        try:
            told = None
            while not self._closed.is_set():
                scale = await self._scale(scaler_codec.pool_of, raw, context)
                activity = _activity(scale)
                if activity != told and (scale.active or scale.replicas is not None):
                    told = activity
                    yield activity
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._closed.wait()
        finally:
            self._streams -= 1

    async def _scale(self, name_in: Callable[[bytes], str | None], raw: bytes, context: rpc.Context) -> Scale:
        """What the pool that is asked about should have; ends the RPC with an error where there is none."""
        try:
            name = name_in(raw)
        except Unreadable as e:
            await context.abort(rpc.INVALID_ARGUMENT, str(e))
            raise
        scale = self._scales(name)
        if scale is None:
            what = f"pool {name!r} does not scale here" if name else "several pools scale here, or none"
            await context.abort(
                rpc.NOT_FOUND,
                f"{what}; name one that has scaling in its configuration under scalerMetadata, key {scaler_codec.POOL}",
            )
            raise LookupError(name)
        return scale


def _activity(scale: Scale) -> bytes:
    return scaler_codec.ACTIVE if scale.active else scaler_codec.INACTIVE
