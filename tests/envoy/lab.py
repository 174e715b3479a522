"""A real Envoy between a client and replicas that do what the test tells them: for checking what Envoy does with our messages.

The configuration is the least that shows the behaviour; the one for use is rendered elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from extproc.envoy import names
from tests.pb.binary import envoy_binary

TYPE = "type.googleapis.com/envoy."
READY_WITHIN_S = 20.0

Json = dict[str, Any]


def typed(kind: str, **fields: Any) -> Json:
    return {"@type": TYPE + kind, **fields}


def cluster(name: str, ports: list[int], **more: Any) -> Json:
    endpoints = [{"endpoint": {"address": socket(port)}} for port in ports]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.25s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        **more,
    }


def socket(port: int) -> Json:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def metadata_key(key: str) -> Json:
    return {"key": names.LB_NAMESPACE, "path": [{"key": key}]}


def picked(name: str, ports: list[int]) -> Json:
    """A cluster whose endpoint is taken from our metadata, and failing that by least request."""
    fallback = typed("extensions.load_balancing_policies.least_request.v3.LeastRequest")
    override = typed(
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": metadata_key(names.DESTINATION)}],
        selected_host_key=metadata_key(names.SERVED),
        fallback_policy=policy("least_request", fallback),
    )
    return cluster(name, ports, load_balancing_policy=policy("override_host", override))


def policy(name: str, config: Json) -> Json:
    full = f"envoy.load_balancing_policies.{name}"
    return {"policies": [{"typed_extension_config": {"name": full, "typed_config": config}}]}


def usage_rules(wrap: bool) -> list[Json]:
    paths = {
        names.PROMPT_TOKENS: ("usage", "prompt_tokens"),
        names.COMPLETION_TOKENS: ("usage", "completion_tokens"),
        names.CACHED_TOKENS: ("usage", "prompt_tokens_details", "cached_tokens"),
    }
    rules = [
        {
            "selectors": [{"key": part} for part in path],
            "on_present": {"metadata_namespace": names.USAGE_NAMESPACE, "key": key, "type": "NUMBER"},
        }
        for key, path in paths.items()
    ]
    return [{"rule": rule} for rule in rules] if wrap else rules


def usage_filters() -> list[Json]:
    parser = typed("extensions.content_parsers.json.v3.JsonContentParser", rules=usage_rules(wrap=True))
    sse = {
        "max_event_size": 65536,
        "content_parser": {"name": "envoy.content_parsers.json", "typed_config": parser},
    }
    plain = {"allow_content_types_regex": {"regex": "application/json(;.*)?"}, "rules": usage_rules(wrap=False)}
    return [
        http_filter("json_to_metadata", "json_to_metadata.v3.JsonToMetadata", response_rules=plain),
        http_filter("sse_to_metadata", "sse_to_metadata.v3.SseToMetadata", response_rules=sse),
    ]


def http_filter(name: str, kind: str, **fields: Any) -> Json:
    return {"name": f"envoy.filters.http.{name}", "typed_config": typed(f"extensions.filters.http.{kind}", **fields)}


def grpc_service() -> Json:
    return {"envoy_grpc": {"cluster_name": names.SERVICE_CLUSTER}}


def ext_proc(processing: Json, **more: Any) -> Json:
    return http_filter(
        "ext_proc",
        "ext_proc.v3.ExternalProcessor",
        grpc_service=grpc_service(),
        message_timeout="2s",
        processing_mode=processing,
        metadata_options={"receiving_namespaces": {"untyped": [names.LB_NAMESPACE, names.NAMESPACE]}},
        **more,
    )


def access_log() -> Json:
    config = {
        "log_name": names.LOG_NAME,
        "transport_api_version": "V3",
        "grpc_service": grpc_service(),
        "buffer_flush_interval": "0.05s",
        "buffer_size_bytes": 1,
        "custom_tags": [
            {"tag": names.TTFT_TAG, "value": "%COMMON_DURATION(DS_RX_BEG:US_RX_BODY_BEG:us)%"},
            {"tag": names.REPLICA_TTFT_TAG, "value": "%COMMON_DURATION(US_TX_BEG:US_RX_BODY_BEG:us)%"},
        ],
    }
    full = typed("extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig", common_config=config)
    return {"name": "envoy.access_loggers.http_grpc", "typed_config": full}


RETRY = {
    "retry_on": "connect-failure,refused-stream,reset-before-request,retriable-status-codes",
    "retriable_status_codes": [503],
    "num_retries": 2,
    "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
}


def routes(pools: list[str]) -> list[Json]:
    """By the pool header where it is there; the first pool for everything else."""

    def route(name: str) -> Json:
        return {"cluster": names.cluster_name(name), "timeout": "0s", "retry_policy": RETRY}

    by_header = [
        {
            "match": {"prefix": "/", "headers": [{"name": names.POOL_HEADER, "string_match": {"exact": name}}]},
            "route": route(name),
        }
        for name in pools
    ]
    return [*by_header, {"match": {"prefix": "/"}, "route": route(pools[0])}]


def bootstrap(
    listen: int, admin: int, service: int, pools: dict[str, list[int]], ext_proc_filter: Json, flush: str | None = None
) -> Json:
    manager = typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="in",
        route_config={
            "virtual_hosts": [
                {"name": "v", "domains": ["*"], "routes": routes(list(pools)), "request_body_buffer_limit": 32 << 20}
            ]
        },
        http_filters=[
            ext_proc_filter,
            *usage_filters(),
            http_filter("router", "router.v3.Router"),
        ],
        access_log=[access_log()],
        access_log_options={"access_log_flush_interval": flush} if flush else {},
    )
    h2 = typed("extensions.upstreams.http.v3.HttpProtocolOptions", explicit_http_config={"http2_protocol_options": {}})
    us = cluster(
        names.SERVICE_CLUSTER,
        [service],
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": h2},
    )
    listener = {
        "name": "l",
        "address": socket(listen),
        "filter_chains": [{"filters": [{"name": "h", "typed_config": manager}]}],
    }
    members = [picked(names.cluster_name(name), ports) for name, ports in pools.items()]
    return {
        "admin": {"address": socket(admin)},
        "static_resources": {"listeners": [listener], "clusters": [us, *members]},
    }


@asynccontextmanager
async def envoy(config: Json, folder: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Envoy with this configuration, ready; stopped at the end."""
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    command = [str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
    with (folder / "envoy.log").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: ASYNC220 - returns at once
    try:
        await _ready(process, config["admin"]["address"]["socket_address"]["port_value"], folder)
        yield process
    finally:
        process.terminate()
        process.wait(10)


async def _ready(process: subprocess.Popen[bytes], admin: int, folder: Path) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                async with session.get(f"http://127.0.0.1:{admin}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.02)
    raise AssertionError((folder / "envoy.log").read_text()[-3000:])


@asynccontextmanager
async def replica(port: int, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[None]:
    """One HTTP server that answers every request with `handle`."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{rest:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait until it holds. Raises AssertionError when it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.01)
