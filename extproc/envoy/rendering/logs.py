"""What Envoy reports of each request: to extproc by gRPC, and to people by a file."""

from __future__ import annotations

from pathlib import Path

import envoy_data_plane.envoy.config.accesslog.v3 as accesslog
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.access_loggers.file.v3 as file
import envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 as grpc
import envoy_data_plane.envoy.type.tracing.v3 as tracing
from envoy_data_plane.google import protobuf

from extproc.config import Config, EnvoyConfig
from extproc.envoy import names
from extproc.envoy.rendering.messages import seconds, to_extproc

TTFT = "%COMMON_DURATION(DS_RX_BEG:US_RX_BODY_BEG:us)%"
"""Microseconds from the first byte of the client's request to the first byte of the replica's body."""
REPLICA_TTFT = "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%"
"""The same from the first byte sent to the replica that answered."""

BATCH_BYTES = 16 * 1024
"""About thirty entries. The price in Python is by message, not by byte, and `log_flush_interval_s` bounds the delay."""
AT_ONCE_BYTES = 1
"""Each entry is sent by itself, where tenants may have so many requests in flight: a client that sends one after the other would be refused
for those whose end is not told yet."""

LINE = {
    "time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%PATH(NQ)%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "cluster": "%UPSTREAM_CLUSTER_RAW%",
    "replica": "%UPSTREAM_REMOTE_ADDRESS%",
    "picked": f"%DYNAMIC_METADATA({names.LB_NAMESPACE}:{names.DESTINATION})%",
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "flight": f"%DYNAMIC_METADATA({names.NAMESPACE}:{names.FLIGHT})%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "request_bytes": "%BYTES_RECEIVED%",
    "response_bytes": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
    "ttft_us": TTFT,
    "replica_ttft_us": REPLICA_TTFT,
    "prompt_tokens": f"%DYNAMIC_METADATA({names.USAGE_NAMESPACE}:{names.PROMPT_TOKENS})%",
    "completion_tokens": f"%DYNAMIC_METADATA({names.USAGE_NAMESPACE}:{names.COMPLETION_TOKENS})%",
    "cached_tokens": f"%DYNAMIC_METADATA({names.USAGE_NAMESPACE}:{names.CACHED_TOKENS})%",
    "broken": f"%DYNAMIC_METADATA({names.USAGE_NAMESPACE}:{names.BROKEN})%",
    "ext_proc": "%FILTER_STATE(envoy.filters.http.ext_proc:PLAIN)%",
}
"""One line of the file. The path is without its query, and the only header is the request id: neither keys nor prompts get here."""


def loggers(config: Config) -> list[accesslog.AccessLog]:
    """To extproc always, to a file where one is named."""
    envoy, at_once = config.envoy, config.tenants is not None and config.tenants.limits_in_flight
    return [_to_extproc(envoy, at_once), *([_to_file(envoy.access_log)] if envoy.access_log else [])]


def _to_extproc(envoy: EnvoyConfig, at_once: bool) -> accesslog.AccessLog:
    common = grpc.CommonGrpcAccessLogConfig(
        log_name=names.LOG_NAME,
        transport_api_version=core.ApiVersion.V3,
        grpc_service=to_extproc(names.LOG_CLUSTER),
        buffer_flush_interval=seconds(envoy.log_flush_interval_s),
        buffer_size_bytes=AT_ONCE_BYTES if at_once else BATCH_BYTES,
        custom_tags=[
            tracing.CustomTag(tag=names.TTFT_TAG, value=TTFT),
            tracing.CustomTag(tag=names.REPLICA_TTFT_TAG, value=REPLICA_TTFT),
        ],
    )
    config = grpc.HttpGrpcAccessLogConfig(common_config=common)
    return accesslog.AccessLog(name="envoy.access_loggers.http_grpc", typed_config=protobuf.Any.pack(config))


def _to_file(path: Path) -> accesslog.AccessLog:
    line = protobuf.Struct.from_dict(LINE)
    config = file.FileAccessLog(path=str(path), log_format=core.SubstitutionFormatString(json_format=line))
    return accesslog.AccessLog(name="envoy.access_loggers.file", typed_config=protobuf.Any.pack(config))
