"""Small shapes that Envoy's configuration repeats everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.type.matcher.v3 as matcher
from envoy_data_plane.google import protobuf

from extproc.envoy import names

MESSAGE = Any
"""Any message of envoy-data-plane; they share a base class that carries no types."""


def seconds(value: float) -> timedelta:
    """A duration as the messages want it."""
    return timedelta(seconds=value)


def extension(name: str, config: MESSAGE) -> core.TypedExtensionConfig:
    """An extension by Envoy's name for it, with its configuration."""
    return core.TypedExtensionConfig(name=name, typed_config=protobuf.Any.pack(config))


def http_filter(name: str, config: MESSAGE) -> hcm.HttpFilter:
    """A filter by Envoy's name for it, with its configuration."""
    return hcm.HttpFilter(name=name, typed_config=protobuf.Any.pack(config))


def address(listener: str) -> core.Address:
    """From `ip:port` or `unix:/path`, as the configuration writes them."""
    if listener.startswith("unix:"):
        return core.Address(pipe=core.Pipe(path=listener.removeprefix("unix:")))
    ip, _, port = listener.rpartition(":")
    ip = ip.removeprefix("[").removesuffix("]")
    return core.Address(socket_address=core.SocketAddress(address=ip, port_value=int(port)))


def to_extproc(cluster: str = names.SERVICE_CLUSTER) -> core.GrpcService:
    """Envoy's own gRPC client rather than Google's: it has the cluster's health checks, breakers and statistics."""
    return core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=cluster))


def exactly(words: Iterable[str]) -> matcher.ListStringMatcher:
    """A matcher for these words and no others."""
    return matcher.ListStringMatcher(patterns=[matcher.StringMatcher(exact=word) for word in words])
