"""Between KEDA's external scaler messages on the wire and our own values; beside `codec.py` the only importer of `extproc.pb`."""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from extproc.envoy.codec import Unreadable
from extproc.pb.externalscaler.externalscaler_pb2 import (
    GetMetricSpecResponse,
    GetMetricsRequest,
    GetMetricsResponse,
    IsActiveResponse,
    MetricSpec,
    MetricValue,
    ScaledObjectRef,
)

METRIC: Final = "extproc-desired-replicas"
"""Name of the one metric; its target is 1 for each replica."""
POOL: Final = "pool"
"""Key of `scalerMetadata` that names the pool."""

ACTIVE: Final = IsActiveResponse(result=True).SerializeToString()
INACTIVE: Final = IsActiveResponse(result=False).SerializeToString()
SPEC: Final = GetMetricSpecResponse(
    metricSpecs=[MetricSpec(metricName=METRIC, targetSize=1, targetSizeFloat=1.0)]
).SerializeToString()


def pool_of(raw: bytes) -> str | None:
    """The pool that a ScaledObjectRef names; None where it names none. Raises Unreadable."""
    try:
        return ScaledObjectRef.FromString(raw).scalerMetadata.get(POOL)
    except DecodeError as e:
        raise Unreadable(f"ScaledObjectRef of {len(raw)} bytes: {e}") from None


def pool_of_metrics(raw: bytes) -> str | None:
    """The same of a GetMetricsRequest. Raises Unreadable."""
    try:
        return GetMetricsRequest.FromString(raw).scaledObjectRef.scalerMetadata.get(POOL)
    except DecodeError as e:
        raise Unreadable(f"GetMetricsRequest of {len(raw)} bytes: {e}") from None


def value(replicas: int) -> bytes:
    """A GetMetricsResponse."""
    found = MetricValue(metricName=METRIC, metricValue=replicas, metricValueFloat=float(replicas))
    return GetMetricsResponse(metricValues=[found]).SerializeToString()
