"""The HTTP filters in their order. Requests meet them from first to last, responses from last to first."""

from __future__ import annotations

import envoy_data_plane.envoy.config.common.mutation_rules.v3 as mutation
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 as ext_proc
import envoy_data_plane.envoy.extensions.filters.http.router.v3 as router
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 as early
import envoy_data_plane.envoy.type.matcher.v3 as matcher
import envoy_data_plane.envoy.type.v3 as types

from extproc.config import Config
from extproc.envoy import names
from extproc.envoy.rendering import usage
from extproc.envoy.rendering.messages import exactly, extension, http_filter, seconds, to_extproc
from extproc.openai.keys import HEADERS as KEY_HEADERS

EXT_PROC = "envoy.filters.http.ext_proc"

SECRET_HEADERS = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key")
"""Not sent to extproc, unless one of them is the configured tenant or session header, or keys are configured; and never taken from the replica, which may check them."""

SETTABLE_HEADERS = (
    names.POOL_HEADER,
    names.PATIENCE_HEADER,
    "x-vllm-priority",
    "content-length",
    "content-type",
    "retry-after",
)
"""All that extproc may set. The length belongs to a rewritten body: Envoy answers 500 to one that does not fit. The last two are those of its refusals."""

TENANT_HEADERS = (
    names.POOL_HEADER,
    "x-envoy-upstream-rq-p[a-z-]*",
    "x-vllm-p[a-z]*",
    "content-length",
    "content-type",
    "retry-after",
    "x-ratelimit-[a-z-]*",
    "www-a[a-z-]*",
)
"""The same where there are tenants, and what their refusals have on top. As patterns, for Envoy 1.40 refuses a rule above RE2's program
size of 100, and the names above take most of that."""

RANKED_HEADERS = (
    names.POOL_HEADER,
    "x-envoy-upstream-rq-p[a-z-]*",
    "x-vllm-p[a-z]*",
    "x-data-p[a-z-]*",
    "content-[lt][a-z]*",
    "retry-a[a-z]*",
)
"""The same where replicas have data parallel ranks; with tenants the last two of theirs come in addition."""

APART_HEADER = "x-[lp][a-z-]*"
"""In place of that of ranks where prefill and decode are apart: both names of that header would be too long."""
MIRROR_HEADERS = ("x-extproc-p[a-z]*", "x-envoy-[a-z-]*", RANKED_HEADERS[2])
"""In place of their first three where a second replica may get a copy: that there is one, and how often Envoy may try another."""
EITHER_HEADER = "x-[dlp][a-z-]*"
"""Where one pool has ranks, and another has them apart: both by their names would be too long."""


def filters(config: Config) -> list[hcm.HttpFilter]:
    """All of them, first to last as a request meets them."""
    return [
        http_filter(EXT_PROC, _ext_proc(config)),
        usage.reader(),
        route(),
    ]


def route() -> hcm.HttpFilter:
    """The last filter of every list."""
    return http_filter("envoy.filters.http.router", router.Router())


def drop_control_headers(config: Config) -> core.TypedExtensionConfig:
    """Before the route is chosen; a filter would come after, and a client could choose its pool by header."""
    ours = list(names.CONTROL_HEADERS)
    if _ranked(config):
        ours.append(names.RANK_HEADER)
    if _apart(config):
        ours += names.SIDECAR_HEADERS
    if _mirrors(config):
        ours += (names.MIRROR_HEADER, names.COPY_HEADER)
    removals = [mutation.HeaderMutation(remove=name) for name in ours]
    return extension("envoy.http.early_header_mutation.header_mutation", early.HeaderMutation(mutations=removals))


def headers_for_us(config: Config) -> list[str]:
    """Request headers that reach extproc and not the replica."""
    session = config.requests.session_header.lower()
    ours = {*names.PRIVATE_HEADERS, names.POOL_HEADER, session} - set(SECRET_HEADERS)
    return sorted(ours)


def _ext_proc(config: Config) -> ext_proc.ExternalProcessor:
    envoy = config.envoy
    cache = ext_proc.ExternalProcessorRouteCacheAction
    return ext_proc.ExternalProcessor(
        grpc_service=to_extproc(),
        failure_mode_allow=config.fails_open,
        # Not 500: it is this service that is missing, and coming again helps. A timeout stays 504 all the same.
        status_on_error=types.HttpStatus(code=types.StatusCode.ServiceUnavailable),
        message_timeout=seconds(envoy.message_timeout_s),
        # For held requests extproc asks for more time; the ordinary timeout stays short, to notice a hang.
        max_message_timeout=seconds(max(config.hold_limit_s, envoy.message_timeout_s)),
        processing_mode=_request_only(),
        # With several pools, a provider, or copies for a second replica, the answer names one in a header and asks for the route to be chosen again (clear_route_cache).
        route_cache_action=cache.DEFAULT if config.names_cluster or _mirrors(config) else cache.RETAIN,
        mutation_rules=_may_set(_settable(config)),
        forward_rules=ext_proc.HeaderForwardingRules(disallowed_headers=exactly(_withheld(config))),
        metadata_options=ext_proc.MetadataOptions(
            forwarding_namespaces=_namespaces(names.SUBSET_NAMESPACE, *_of_claims(config)),
            receiving_namespaces=_namespaces(names.LB_NAMESPACE, names.NAMESPACE),
        ),
    )


def _request_only() -> ext_proc.ProcessingMode:
    """The pick comes with the answer to the body. Without the header message Envoy 1.40 chooses the host before that answer, and ignores the pick."""
    headers, body = ext_proc.ProcessingModeHeaderSendMode, ext_proc.ProcessingModeBodySendMode
    return ext_proc.ProcessingMode(
        request_header_mode=headers.SEND,
        request_body_mode=body.BUFFERED,
        request_trailer_mode=headers.SKIP,
        response_header_mode=headers.SKIP,
        response_body_mode=body.NONE,
        response_trailer_mode=headers.SKIP,
    )


def _ranked(config: Config) -> bool:
    return any(pool.data_parallel > 1 for pool in config.pools)


def _apart(config: Config) -> bool:
    return any(pool.disaggregation is not None for pool in config.pools)


def _mirrors(config: Config) -> bool:
    return any(pool.mirrors for pool in config.pools)


def _settable(config: Config) -> tuple[str, ...]:
    ranked, apart = _ranked(config), _apart(config)
    if ranked or apart:
        engines = EITHER_HEADER if ranked and apart else APART_HEADER if apart else RANKED_HEADERS[3]
        first = MIRROR_HEADERS if _mirrors(config) else RANKED_HEADERS[:3]
        ours = (*first, engines, *RANKED_HEADERS[4:])
        return (*ours, *TENANT_HEADERS[-2:]) if config.tenants else ours
    return TENANT_HEADERS if config.tenants else SETTABLE_HEADERS


def _may_set(headers: tuple[str, ...]) -> mutation.HeaderMutationRules:
    """`allow_expression` restricts nothing by itself; only with `disallow_all` is it a list of exceptions."""
    allowed = matcher.RegexMatcher(regex=f"^({'|'.join(headers)})$")
    return mutation.HeaderMutationRules(disallow_all=True, allow_expression=allowed)


def _withheld(config: Config) -> list[str]:
    read = {config.requests.session_header.lower(), (config.requests.tenant_header or "").lower()}
    if config.tenants is not None and config.tenants.keys_file is not None:
        read |= set(KEY_HEADERS)
    return [name for name in SECRET_HEADERS if name not in read]


def _of_claims(config: Config) -> tuple[str, ...]:
    return (names.JWT_NAMESPACE,) if config.tenants is not None and config.tenants.jwt is not None else ()


def _namespaces(*untyped: str) -> ext_proc.MetadataOptionsMetadataNamespaces:
    return ext_proc.MetadataOptionsMetadataNamespaces(untyped=list(untyped))
