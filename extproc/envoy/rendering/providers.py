"""Providers: a cluster and a route for each. Envoy resolves the name, speaks TLS, and puts in the API key, which nobody else reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from ipaddress import ip_address
from typing import Final

import envoy_data_plane.envoy.config.cluster.v3 as cluster
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.endpoint.v3 as endpoint
import envoy_data_plane.envoy.config.route.v3 as route
import envoy_data_plane.envoy.extensions.clusters.common.dns.v3 as dns_common
import envoy_data_plane.envoy.extensions.clusters.dns.v3 as dns
import envoy_data_plane.envoy.extensions.filters.http.credential_injector.v3 as injector
import envoy_data_plane.envoy.extensions.filters.http.lua.v3 as lua
import envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 as codec
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.extensions.http.injected_credentials.generic.v3 as generic
import envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 as tls
import envoy_data_plane.envoy.extensions.upstreams.http.v3 as upstream
import envoy_data_plane.envoy.type.matcher.v3 as matcher
from envoy_data_plane.google import protobuf

from extproc.config import Config, ProviderConfig
from extproc.envoy import credentials, names
from extproc.envoy.rendering import clusters
from extproc.envoy.rendering.filters import SECRET_HEADERS
from extproc.envoy.rendering.messages import extension, http_filter, seconds
from extproc.openai.errors import CONTENTION, UNAVAILABLE

SYSTEM_CA: Final = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian, Ubuntu, Alpine and Envoy's own images have the authorities that they trust; Envoy has none of its own."""

CONNECT_S: Final = 5.0
"""Name to handshake: a few round trips across an ocean, and a lost packet. The quarter of a second for replicas would be too short."""

REUSE_S: Final = 50.0
"""Idle connections are closed after this long: load balancers in front of such APIs close theirs after 60 s, and a request that meets
that close is lost."""

PING_S: Final = (30.0, 15.0)
"""From one HTTP/2 ping to the next, and for its answer. A model may think for minutes without a word, but its server answers."""

RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request"
"""Only what cannot have cost anything: the provider never had the request."""

READ: Final = "/v1/"
"""Where all the paths begin whose bodies are read, and so all that can be sent to a provider."""

OUT: Final = (
    "accept",
    "content-length",
    "content-type",
    "openai-beta",
    "transfer-encoding",
    "user-agent",
)
"""Request headers that a provider gets, besides the key."""

IN: Final = (
    "cache-control",
    "content-encoding",
    "content-length",
    "content-type",
    "date",
    "retry-after",
    "transfer-encoding",
    "x-request-id",
)
"""Response headers that a client gets of it."""

LIMITED: Final = "The provider of this model takes no more requests at present. Please try again later."
REFUSED: Final = "The provider of this model does not serve us at present. Please try again later."
FAILED: Final = "The provider of this model failed. Please try again later."


def of(config: Config) -> list[cluster.Cluster]:
    """The clusters."""
    return [_cluster(provider, config) for provider in config.providers]


def routes(config: Config) -> list[route.Route]:
    """For requests that extproc sends there; no other request meets them."""
    return [_route(provider, config) for provider in config.providers]


def _route(provider: ProviderConfig, config: Config) -> route.Route:
    named = route.HeaderMatcher(name=names.POOL_HEADER, string_match=matcher.StringMatcher(exact=provider.name))
    tenant = config.requests.tenant_header
    return route.Route(
        name=f"provider {provider.name}",
        match=route.RouteMatch(prefix=READ, headers=[named]),
        route=route.RouteAction(
            cluster=names.provider_cluster(provider.name),
            host_rewrite_literal=_authority(provider),
            prefix_rewrite=f"{provider.base_path}/",
            timeout=seconds(0),
            idle_timeout=seconds(provider.timeout_s),
            # In place of those for replicas: nobody else is to be asked, and nothing to be paid for twice.
            retry_policy=route.RetryPolicy(retry_on=RETRY_ON, num_retries=1),
            hedge_policy=route.HedgePolicy(),
        ),
        # The script in the cluster removes all but a few. Keys of clients do not depend on it.
        request_headers_to_remove=sorted({*SECRET_HEADERS, *([tenant.lower()] if tenant else [])}),
    )


def _authority(provider: ProviderConfig) -> str:
    return provider.host if provider.port == (443 if provider.tls else 80) else f"{provider.host}:{provider.port}"


def _cluster(provider: ProviderConfig, config: Config) -> cluster.Cluster:
    name = names.provider_cluster(provider.name)
    at = core.Address(socket_address=core.SocketAddress(address=provider.host, port_value=provider.port))
    host = endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=at, hostname=provider.host))
    return cluster.Cluster(
        name=name,
        cluster_type=_resolved(),
        load_assignment=endpoint.ClusterLoadAssignment(
            cluster_name=name, endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=[host])]
        ),
        connect_timeout=seconds(CONNECT_S),
        transport_socket=_tls(provider) if provider.tls else None,
        typed_extension_protocol_options=_protocol(provider, config),
        circuit_breakers=clusters.breakers(),
        # Replicas are served from the start, whether or not the name can be resolved.
        wait_for_warm_on_init=False,
        upstream_connection_options=clusters.keepalive(),
    )


def _resolved() -> cluster.ClusterCustomClusterType:
    """All addresses of the name are one host, and of both families the first that answers is taken (RFC 8305)."""
    resolved = dns.DnsCluster(
        respect_dns_ttl=True,
        dns_lookup_family=dns_common.DnsLookupFamily.ALL,
        all_addresses_in_single_endpoint=True,
    )
    return cluster.ClusterCustomClusterType(name="envoy.clusters.dns", typed_config=protobuf.Any.pack(resolved))


def _tls(provider: ProviderConfig) -> core.TransportSocket:
    """The certificate is verified for the host, by the authorities of `ca_file` or the system."""
    is_ip = _is_ip(provider.host)
    kinds = tls.SubjectAltNameMatcherSanType
    named = tls.SubjectAltNameMatcher(
        san_type=kinds.IP_ADDRESS if is_ip else kinds.DNS, matcher=matcher.StringMatcher(exact=provider.host)
    )
    trusted = tls.CertificateValidationContext(
        trusted_ca=core.DataSource(filename=str(provider.ca_file or SYSTEM_CA)),
        match_typed_subject_alt_names=[named],
    )
    context = tls.UpstreamTlsContext(
        sni="" if is_ip else provider.host,  # RFC 6066: names only
        common_tls_context=tls.CommonTlsContext(
            tls_params=tls.TlsParameters(tls_minimum_protocol_version=tls.TlsParametersTlsProtocol.TLSv1_2),
            validation_context=trusted,
        ),
    )
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=protobuf.Any.pack(context))


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _protocol(provider: ProviderConfig, config: Config) -> dict[str, protobuf.Any]:
    """HTTP/2 where both sides agree on it in the handshake, else 1.1."""
    # All requests share one connection: one whose other end is gone would swallow them for as long as the kernel tries to reach it.
    pings = core.KeepaliveSettings(interval=seconds(PING_S[0]), timeout=seconds(PING_S[1]))
    http1, http2 = core.Http1ProtocolOptions(), core.Http2ProtocolOptions(connection_keepalive=pings)
    agreed = upstream.HttpProtocolOptionsAutoHttpConfig(http_protocol_options=http1, http2_protocol_options=http2)
    plain = upstream.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=http1)
    options = upstream.HttpProtocolOptions(
        auto_config=agreed if provider.tls else None,
        explicit_http_config=None if provider.tls else plain,
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=seconds(REUSE_S)),
        http_filters=list(_filters(provider, config)),
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protobuf.Any.pack(options)}


def _filters(provider: ProviderConfig, config: Config) -> Iterator[hcm.HttpFilter]:
    """In the cluster and not in the listener: no mistake of a route takes the key elsewhere."""
    source = core.DataSource(inline_string=script(provider.query))
    yield http_filter("envoy.filters.http.lua", lua.Lua(default_source_code=source))
    if provider.api_key_file is not None:
        yield http_filter("envoy.filters.http.credential_injector", _injected(provider, config))
    yield http_filter("envoy.filters.http.upstream_codec", codec.UpstreamCodec())


def _injected(provider: ProviderConfig, config: Config) -> injector.CredentialInjector:
    file = credentials.file_of(config.envoy.endpoints_file, provider.name)
    source = core.ConfigSource(
        resource_api_version=core.ApiVersion.V3,
        initial_fetch_timeout=seconds(clusters.FIRST_FETCH_S),
        path_config_source=core.PathConfigSource(path=str(file)),
    )
    key = generic.Generic(
        credential=tls.SdsSecretConfig(name=names.provider_key(provider.name), sds_config=source),
        header=provider.api_key_header,
        header_value_prefix="Bearer " if provider.api_key_header == "authorization" else "",
    )
    return injector.CredentialInjector(
        overwrite=True, credential=extension("envoy.http.injected_credentials.generic", key)
    )


def script(query: str) -> str:
    """provider.lua with headers, errors and the query of a provider put in."""
    text = resources.files("extproc.envoy.rendering").joinpath("provider.lua").read_text()
    values = {
        "OUT": _set(OUT),
        "QUERY": f"?{query}" if query else "",
        "IN": _set(IN),
        "LIMITED": _error(LIMITED, CONTENTION),
        "REFUSED": _error(REFUSED, UNAVAILABLE),
        "FAILED": _error(FAILED, UNAVAILABLE),
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _set(words: Iterable[str]) -> str:
    return ", ".join(f'["{word}"] = true' for word in words)


def _error(message: str, kind: str) -> str:
    text = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": "%STATUS%"}})
    return text.replace('"%STATUS%"', "%STATUS%")  # a number, as in other errors
