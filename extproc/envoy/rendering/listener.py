"""The listener and its HTTP connection manager."""

from __future__ import annotations

import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.listener.v3 as listener
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
from envoy_data_plane.google import protobuf

from extproc.config import Config, EnvoyConfig
from extproc.envoy.rendering import filters, logs, replies, routes
from extproc.envoy.rendering.messages import address, seconds

STREAMS = 100
"""Requests at once on one HTTP/2 connection of a client. A further one opens another connection; unlimited, one client could take all memory."""

STREAM_WINDOW = 64 * 1024
CONNECTION_WINDOW = 1024 * 1024
"""Bytes in flight for a request body and for a connection; Envoy's own defaults of 16 and 24 MiB are meant for trusted peers."""

CONNECTION_BUFFER = 1024 * 1024
"""Bytes that Envoy holds for a connection before it stops reading. Request bodies have their own limit (`request_body_buffer_limit`)."""

HEADERS_WITHIN_S = 10.0
"""Time to send the request's headers; the body may take longer."""


def rendered(config: Config, baseline: bool) -> listener.Listener:
    """Where clients connect; with `baseline` no extproc is in the way."""
    manager = listener.Filter(
        name="envoy.filters.network.http_connection_manager", typed_config=protobuf.Any.pack(_manager(config, baseline))
    )
    return listener.Listener(
        name="requests",
        address=address(config.envoy.listen),
        filter_chains=[listener.FilterChain(filters=[manager])],
        per_connection_buffer_limit_bytes=CONNECTION_BUFFER,
    )


def _manager(config: Config, baseline: bool) -> hcm.HttpConnectionManager:
    envoy = config.envoy
    paths = hcm.HttpConnectionManagerPathWithEscapedSlashesAction
    return hcm.HttpConnectionManager(
        stat_prefix="requests",
        codec_type=hcm.HttpConnectionManagerCodecType.AUTO,
        route_config=routes.table(config, baseline),
        http_filters=[filters.route()] if baseline else filters.filters(config),
        access_log=[] if baseline else logs.loggers(config),
        access_log_options=None if baseline else _progress(envoy),
        local_reply_config=None if baseline else replies.local(config),
        scheme_header_transformation=_scheme(config),
        early_header_mutation_extensions=[filters.drop_control_headers(config)],
        # The peer is the client: x-envoy-* headers, which could set retries and timeouts, are removed from its requests.
        use_remote_address=True,
        generate_request_id=True,
        preserve_external_request_id=True,
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action=paths.REJECT_REQUEST,
        common_http_protocol_options=_headers(),
        http2_protocol_options=_http2(),
        request_headers_timeout=seconds(HEADERS_WITHIN_S),
        request_timeout=seconds(0),
        stream_idle_timeout=seconds(envoy.stream_idle_timeout_s),
        upgrade_configs=[hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="websocket", enabled=False)],
    )


def _scheme(config: Config) -> core.SchemeHeaderTransformation | None:
    """`:scheme` says how a client came, and a provider that speaks HTTP/2 over TLS may refuse a request for http (RFC 9113, 8.3.1)."""
    if not any(provider.tls for provider in config.providers):
        return None
    return core.SchemeHeaderTransformation(match_upstream=True)


def _progress(envoy: EnvoyConfig) -> hcm.HttpConnectionManagerHcmAccessLogOptions | None:
    """Entries of requests that still run."""
    if envoy.progress_interval_s is None:
        return None
    return hcm.HttpConnectionManagerHcmAccessLogOptions(access_log_flush_interval=seconds(envoy.progress_interval_s))


def _headers() -> core.HttpProtocolOptions:
    # Dropped and not refused: some clients send such headers without need, and no replica reads them. Passed on, `x_session_id` would
    # be read as `x-session-id` by any server behind that maps one to the other.
    underscores = core.HttpProtocolOptionsHeadersWithUnderscoresAction.DROP_HEADER
    return core.HttpProtocolOptions(headers_with_underscores_action=underscores)


def _http2() -> core.Http2ProtocolOptions:
    return core.Http2ProtocolOptions(
        max_concurrent_streams=STREAMS,
        initial_stream_window_size=STREAM_WINDOW,
        initial_connection_window_size=CONNECTION_WINDOW,
    )
