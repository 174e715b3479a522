"""Clusters: extproc itself, and one for each pool with the members of the watched file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import envoy_data_plane.envoy.config.cluster.v3 as cluster
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.endpoint.v3 as endpoint
import envoy_data_plane.envoy.extensions.load_balancing_policies.least_request.v3 as least_request
import envoy_data_plane.envoy.extensions.load_balancing_policies.override_host.v3 as override_host
import envoy_data_plane.envoy.extensions.load_balancing_policies.random.v3 as random
import envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin.v3 as round_robin
import envoy_data_plane.envoy.extensions.upstreams.http.v3 as upstream
import envoy_data_plane.envoy.type.metadata.v3 as metadata
import envoy_data_plane.envoy.type.v3 as types
from envoy_data_plane.google import protobuf

from extproc.config import Config
from extproc.envoy import names
from extproc.envoy.endpoints import file_of
from extproc.envoy.rendering.messages import MESSAGE, address, extension, seconds

MANY = 1_000_000
"""Circuit breakers as good as open. The default of 1024 requests fails the next one at once with 500 or 503; how much is too much is for extproc to say."""

REUSE_S = 4.0
"""Idle connections to replicas are closed after this long: uvicorn, which serves vLLM, closes after 5 s, and a request that meets that close is lost. Later costs failures, earlier a handshake."""

FIRST_FETCH_S = 2.0
"""How long Envoy's start waits for a readable file of members; then it starts without. Envoy's default is 15 s."""


def extproc(grpc_listener: str) -> cluster.Cluster:
    """Where ext_proc and the health check go."""
    # Ends the streams that a stopped process holds, which the health check does not. gRPC's own threads answer pings, so a busy
    # event loop is not taken for a dead one.
    pings = core.KeepaliveSettings(interval=seconds(0.5), timeout=seconds(1.0))
    service = _service(names.SERVICE_CLUSTER, grpc_listener, core.Http2ProtocolOptions(connection_keepalive=pings))
    service.health_checks = [_grpc_health()]
    # A process that hangs keeps its sockets open and its backlog accepting: only a failed check keeps new streams away, and only
    # without panic. Streams already there go on (Envoy 1.40 drains HTTP connections and does not close them).
    service.close_connections_on_host_health_failure = True
    service.common_lb_config = _panic_below(0.0)
    return service


def extproc_log(grpc_listener: str) -> cluster.Cluster:
    """Where the access log goes. Its stream outlives a process that stops for a while, so that no end of a request is lost."""
    return _service(names.LOG_CLUSTER, grpc_listener, core.Http2ProtocolOptions())


def _service(name: str, grpc_listener: str, http2: core.Http2ProtocolOptions) -> cluster.Cluster:
    host = endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=address(grpc_listener)))
    return cluster.Cluster(
        name=name,
        type=cluster.ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(0.25),
        load_assignment=endpoint.ClusterLoadAssignment(
            cluster_name=name, endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=[host])]
        ),
        typed_extension_protocol_options=_protocol(
            upstream.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2)
        ),
        circuit_breakers=breakers(),
    )


def pool(name: str, config: Config, baseline: str | None) -> cluster.Cluster:
    """The replicas of one pool. With `baseline` Envoy's own policy of that name chooses, without it the pick of extproc."""
    envoy = config.envoy
    mirrored = any(p.name == name and p.mirrors for p in config.pools)
    members = file_of(envoy.endpoints_file, name, [p.name for p in config.pools])
    return cluster.Cluster(
        name=names.cluster_name(name),
        type=cluster.ClusterDiscoveryType.EDS,
        eds_cluster_config=cluster.ClusterEdsClusterConfig(eds_config=_watched(members)),
        connect_timeout=seconds(envoy.connect_timeout_s),
        load_balancing_policy=POLICIES[baseline]() if baseline else _picked(mirrored),
        typed_extension_protocol_options=_protocol(
            upstream.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions()),
            core.HttpProtocolOptions(idle_timeout=seconds(REUSE_S)),
        ),
        circuit_breakers=breakers(),
        common_lb_config=_panic_below(1.0),
        # A member that left the file is gone, even if its last health was good; its open streams run on.
        ignore_health_on_host_removal=True,
        upstream_connection_options=keepalive(),
    )


def keepalive() -> cluster.UpstreamConnectionOptions:
    """A host that lost power says nothing. Long silence is normal while a prefill waits, so the kernel has to ask."""
    return cluster.UpstreamConnectionOptions(
        tcp_keepalive=core.TcpKeepalive(keepalive_time=30, keepalive_interval=10, keepalive_probes=3)
    )


def _watched(path: Path) -> core.ConfigSource:
    return core.ConfigSource(
        resource_api_version=core.ApiVersion.V3,
        initial_fetch_timeout=seconds(FIRST_FETCH_S),
        path_config_source=core.PathConfigSource(
            # The directory is watched, since a rename replaces the file that a watch on the file itself would hold.
            path=str(path),
            watched_directory=core.WatchedDirectory(path=str(path.parent)),
        ),
    )


def _picked(mirrored: bool) -> cluster.LoadBalancingPolicy:
    """The endpoints that extproc names, in their order; with none named, or none of them a member, the fallback.

    `mirrored`: there may be copies of requests. They have the metadata of the request (Envoy 1.40), so what is said of the copy comes
    first, in a header that the request itself does not have.
    """
    config = override_host.OverrideHost(
        # From metadata: only members can be named, and no client can name one. What a client writes into the header of copies is dropped.
        override_host_sources=[
            *([override_host.OverrideHostOverrideHostSource(header=names.COPY_HEADER)] if mirrored else []),
            override_host.OverrideHostOverrideHostSource(metadata=_key(names.DESTINATION)),
        ],
        selected_host_key=_key(names.SERVED),
        fallback_policy=least_requests(),
    )
    return _policy("envoy.load_balancing_policies.override_host", config)


def least_requests() -> cluster.LoadBalancingPolicy:
    """Envoy's own choice, where there is no pick: the fewer active requests of two drawn."""
    return _policy("envoy.load_balancing_policies.least_request", least_request.LeastRequest())


def _round_robin() -> cluster.LoadBalancingPolicy:
    return _policy("envoy.load_balancing_policies.round_robin", round_robin.RoundRobin())


def _random() -> cluster.LoadBalancingPolicy:
    return _policy("envoy.load_balancing_policies.random", random.Random())


POLICIES: dict[str, Callable[[], cluster.LoadBalancingPolicy]] = {
    "round_robin": _round_robin,
    "least_request": least_requests,
    "random": _random,
}
"""Envoy's own policies, to compare with."""


def _policy(name: str, config: MESSAGE) -> cluster.LoadBalancingPolicy:
    return cluster.LoadBalancingPolicy(
        policies=[cluster.LoadBalancingPolicyPolicy(typed_extension_config=extension(name, config))]
    )


def _key(key: str) -> metadata.MetadataKey:
    return metadata.MetadataKey(key=names.LB_NAMESPACE, path=[metadata.MetadataKeyPathSegment(key=key)])


def breakers() -> cluster.CircuitBreakers:
    """As good as none: see MANY."""
    # max_retries counts every retried request until it ends; its default of 3 would stop retries after three long streams.
    limits = cluster.CircuitBreakersThresholds(
        max_connections=MANY, max_pending_requests=MANY, max_requests=MANY, max_retries=MANY
    )
    return cluster.CircuitBreakers(thresholds=[limits])


def _protocol(
    explicit: upstream.HttpProtocolOptionsExplicitHttpConfig, common: core.HttpProtocolOptions | None = None
) -> dict[str, protobuf.Any]:
    options = upstream.HttpProtocolOptions(explicit_http_config=explicit, common_http_protocol_options=common)
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protobuf.Any.pack(options)}


def _grpc_health() -> core.HealthCheck:
    """A hung process is out after 0.5 to 0.8 s and in again as soon. `no_traffic_interval` is 60 s unless set."""
    every = seconds(0.5)
    return core.HealthCheck(
        timeout=seconds(0.3),
        interval=every,
        unhealthy_interval=every,
        no_traffic_interval=every,
        unhealthy_threshold=1,
        healthy_threshold=1,
        grpc_health_check=core.HealthCheckGrpcHealthCheck(),
    )


def _panic_below(percent: float) -> cluster.ClusterCommonLbConfig:
    """Below this share of healthy members, health is ignored. For replicas 1: only when all are marked unhealthy is the mark more likely
    to be wrong than the fleet to be gone. The default of 50 would send half of a wounded fleet's requests to its dead.
    """
    return cluster.ClusterCommonLbConfig(healthy_panic_threshold=types.Percent(value=percent))
