"""The bootstrap put together."""

from __future__ import annotations

from typing import Any

import betterproto2
import envoy_data_plane.envoy.config.bootstrap.v3 as bootstrap
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.overload.v3 as overload
import envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections.v3 as connections
from envoy_data_plane.google import protobuf

from extproc.config import Config
from extproc.envoy.rendering import clusters, listener, providers
from extproc.envoy.rendering.messages import address

MAX_CONNECTIONS = 50_000
"""Clients at once; Envoy warns at start when there is no limit, and without one runs out of descriptors or memory instead."""


def rendered(config: Config, baseline: str | None) -> dict[str, Any]:
    """The bootstrap in the names of Envoy's documentation (snake case), ready for JSON or YAML."""
    pools = [clusters.pool(p.name, config, baseline) for p in config.pools]
    elsewhere = [] if baseline else providers.of(config)
    extproc = [] if baseline else [clusters.extproc(config.listen.grpc), clusters.extproc_log(config.listen.grpc)]
    whole = bootstrap.Bootstrap(
        node=core.Node(id="extproc", cluster="extproc"),
        admin=bootstrap.Admin(address=address(config.envoy.admin)) if config.envoy.admin else None,
        static_resources=bootstrap.BootstrapStaticResources(
            listeners=[listener.rendered(config, baseline is not None)], clusters=[*pools, *elsewhere, *extproc]
        ),
        overload_manager=overload.OverloadManager(resource_monitors=[_connections()]),
    )
    result: dict[str, Any] = whole.to_dict(casing=betterproto2.Casing.SNAKE)
    return result


def _connections() -> overload.ResourceMonitor:
    limit = connections.DownstreamConnectionsConfig(max_active_downstream_connections=MAX_CONNECTIONS)
    return overload.ResourceMonitor(
        name="envoy.resource_monitors.global_downstream_max_connections", typed_config=protobuf.Any.pack(limit)
    )
