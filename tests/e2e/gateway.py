"""Gateways with an InferencePool, as far as one Envoy shows them: the filter and the cluster that they make of it, in front of extproc and replicas.

    async with gateway(tmp_path, ORIGINAL_DST, {"replicas": [a.address, b.address]}) as s:
        async with s.post() as response:
            ...

Two shapes of cluster are in use (read in the gateways' sources):

* `ORIGINAL_DST`: the address in the request header is where the request goes. Envoy AI Gateway (failureMode FailClose), older kgateway,
  llm-d's standalone Envoy.
* `OVERRIDE_HOST`: the members of the pool, of which that in the dynamic metadata is taken. Istio, Envoy AI Gateway (FailOpen), llm-d behind them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from extproc.app import App
from extproc.config import Config
from extproc.envoy import names
from tests.e2e.stack import Json, Stack, all_ready, client, configured, connected
from tests.envoy import lab
from tests.envoy.setup import DUPLEX_BOTH
from tests.support.envoy import EnvoyProcess
from tests.support.ports import free_port
from tests.support.waiting import until

ORIGINAL_DST = "original_dst"
OVERRIDE_HOST = "override_host"
POOL = "endpoints"
"""Envoy's cluster of the pool."""
SUBSET_HEADER = "x-test-subset"
"""Request header that becomes the subset hint as it is; in `SUBSET_LIST_HEADER` as a Value in base64."""
SUBSET_LIST_HEADER = "x-test-subset-list"


def picker(config: Config, *, message_timeout: str = "5s", **more: Any) -> Json:
    """The filter of the endpoint picker: both bodies streamed both ways, closed when it fails, no say on what may be changed."""
    forwarded = {"forwarding_namespaces": {"untyped": [names.SUBSET_NAMESPACE, names.LB_NAMESPACE]}}
    received = {"receiving_namespaces": {"untyped": [names.LB_NAMESPACE]}}
    given = {
        "grpc_service": lab.grpc_service(),
        "message_timeout": message_timeout,
        "processing_mode": DUPLEX_BOTH,
        "metadata_options": {**forwarded, **received},
    }
    return lab.http_filter("ext_proc", "ext_proc.v3.ExternalProcessor", **given, **more)


def subset_hints() -> Json:
    """What a gateway's own subset rules would leave, here by headers of the test."""

    def rule(header: str, **value: str) -> Json:
        put = {"metadata_namespace": names.SUBSET_NAMESPACE, "key": names.SUBSET, **value}
        return {"header": header, "on_header_present": put, "remove": True}

    rules = [rule(SUBSET_HEADER), rule(SUBSET_LIST_HEADER, type="PROTOBUF_VALUE", encode="BASE64")]
    return lab.http_filter("header_to_metadata", "header_to_metadata.v3.Config", request_rules=rules)


def endpoints(shape: str, ports: list[int]) -> Json:
    """The cluster of the pool; `ports` are those that a gateway would have found by the pool's selector."""
    if shape == ORIGINAL_DST:
        by = {"use_http_header": True, "http_header_name": names.DESTINATION}
        kind: Json = {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "original_dst_lb_config": by}
        return {"name": POOL, "connect_timeout": "0.25s", **kind}
    return lab.picked(POOL, ports)


def bootstrap(config: Config, shape: str, ports: list[int], filters: list[Json]) -> Json:
    """Envoy as the gateway has it; no access log, for no gateway sends one to its picker."""
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": POOL, "timeout": "0s"}}]
    manager = lab.typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        route_config={"virtual_hosts": [{"name": "v", "domains": ["*"], "routes": routes}]},
        http_filters=[*filters, lab.http_filter("router", "router.v3.Router")],
    )
    listener = {
        "name": "l",
        "address": lab.socket(_port(config.envoy.listen)),
        "filter_chains": [{"filters": [{"name": "h", "typed_config": manager}]}],
    }
    clusters = [service(names.SERVICE_CLUSTER, _port(config.listen.grpc)), endpoints(shape, ports)]
    return {
        "admin": {"address": lab.socket(_port(config.envoy.admin or ""))},
        "static_resources": {"listeners": [listener], "clusters": clusters},
    }


def service(name: str, port: int) -> Json:
    """A cluster of one gRPC service."""
    h2 = lab.typed(
        "extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}}
    )
    options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": h2}
    return lab.cluster(name, [port], typed_extension_protocol_options=options)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


@asynccontextmanager
async def gateway(
    directory: Path,
    shape: str,
    *pools: Json,
    ready: bool = True,
    change: Callable[[Json], None] = lambda _: None,
    timeout: str = "5s",
    **sections: Any,
) -> AsyncIterator[Stack]:
    """Started; `change` may edit the bootstrap. Flights end with their responses, which go through extproc."""
    requests = {"flight_ttl_s": 60, **sections.pop("requests", {})}
    given = {"envoy": {"endpoints": 1, **sections.pop("envoy", {})}, "requests": requests, **sections}
    config = configured(directory, *pools, **given)
    app = App(config)
    await app.start()
    try:
        if ready:
            await until(lambda: all_ready(app))
        members = [_port(m.address) for _, m in app.router.members()] or [free_port()]
        rendered = bootstrap(config, shape, members, [subset_hints(), picker(config, message_timeout=timeout)])
        change(rendered)
        async with EnvoyProcess(rendered) as envoy, client() as session:
            running = Stack(config, app, envoy, session)
            await until(lambda: connected(envoy))
            yield running
            await running.settled()
    finally:
        await app.stop(grace_s=1.0)
