"""Which cluster a request goes to, and how often it is tried."""

from __future__ import annotations

import envoy_data_plane.envoy.config.common.mutation_rules.v3 as mutation
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.route.v3 as route
import envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 as ext_proc
import envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 as previous_hosts
import envoy_data_plane.envoy.type.matcher.v3 as matcher
from envoy_data_plane.google import protobuf

from extproc.config import Config, EnvoyConfig
from extproc.envoy import names
from extproc.envoy.rendering import providers
from extproc.envoy.rendering.filters import EXT_PROC, headers_for_us
from extproc.envoy.rendering.messages import seconds

BODY_HEADROOM = 64 * 1024
"""Bytes above `requests.max_body_bytes` that Envoy still buffers, so that it is extproc that refuses a body that is a little too long."""

RETRY_ON = ("connect-failure", "refused-stream", "retriable-status-codes")
"""Always: the replica did not take the request, or says that it failed."""


def table(config: Config, baseline: bool) -> route.RouteConfiguration:
    """Paths without extproc first, then the pool or provider that it names, then the first pool: for baseline, fail-open and unread paths."""
    routes = (
        [] if baseline else [*_past_extproc(config), *_mirrored(config), *_by_pool(config), *providers.routes(config)]
    )
    first = _action(config.pools[0].name)
    routes.append(route.Route(name="default", match=route.RouteMatch(prefix="/"), route=first))
    host = route.VirtualHost(
        name="all",
        domains=["*"],
        routes=routes,
        request_headers_to_remove=headers_for_us(config),
        retry_policy=_retries(config.envoy) if config.envoy.retries else None,
        # Whoever is out of patience with a replica asks the next, and takes what comes first: to have misjudged a slow one costs
        # work, and no error.
        hedge_policy=route.HedgePolicy(hedge_on_per_try_timeout=True) if config.envoy.retries else None,
        response_headers_to_add=[
            *([_who_answered()] if config.envoy.response_headers else []),
            *([_what_is_left(name) for name in names.RATELIMIT_HEADERS] if config.tenants and not baseline else []),
        ],
        # Also what a retry may send again. Above it Envoy answers 413 by itself.
        request_body_buffer_limit=config.requests.max_body_bytes + BODY_HEADROOM,
    )
    return route.RouteConfiguration(name="extproc", virtual_hosts=[host])


def _past_extproc(config: Config) -> list[route.Route]:
    """WebSocket upgrades are allowed only here: with a buffered body ext_proc would wait for the end of one without end."""
    off = {EXT_PROC: protobuf.Any.pack(ext_proc.ExtProcPerRoute(disabled=True))}
    return [
        route.Route(
            name=f"without extproc: {prefix}",
            match=route.RouteMatch(prefix=prefix),
            route=_action(config.pools[0].name, upgrade=True),
            typed_per_filter_config=off,
        )
        for prefix in config.envoy.disabled_paths
    ]


def _by_pool(config: Config) -> list[route.Route]:
    if not config.names_cluster:
        return []
    return [
        route.Route(
            name=f"pool {pool.name}",
            match=route.RouteMatch(prefix="/", headers=[_header_is(names.POOL_HEADER, pool.name)]),
            route=_action(pool.name),
        )
        for pool in config.pools
    ]


def _mirrored(config: Config) -> list[route.Route]:
    """Of requests whose prompt another replica computes: it gets the same one, at the same time, and nobody reads what it answers."""
    return [
        route.Route(
            name=f"prefill and decode {pool.name}",
            match=route.RouteMatch(
                prefix="/",
                headers=[
                    route.HeaderMatcher(name=names.MIRROR_HEADER, present_match=True),
                    *([_header_is(names.POOL_HEADER, pool.name)] if config.names_cluster else []),
                ],
            ),
            route=_action(pool.name, mirrored=True),
            request_headers_to_remove=[names.MIRROR_HEADER],
        )
        for pool in config.pools
        if pool.mirrors
    ]


def _action(pool: str, *, upgrade: bool = False, mirrored: bool = False) -> route.RouteAction:
    cluster = names.cluster_name(pool)
    return route.RouteAction(
        cluster=cluster,
        request_mirror_policies=[_copy(cluster)] if mirrored else [],
        retry_policy=_retries_mirrored() if mirrored else None,
        timeout=seconds(0),  # a generation may take any time; stream_idle_timeout ends a silent one
        upgrade_configs=[route.RouteActionUpgradeConfig(upgrade_type="websocket", enabled=True)] if upgrade else [],
    )


def _retries(envoy: EnvoyConfig) -> route.RetryPolicy:
    """Each retry takes the next endpoint of the pick; when those are used up, one of the fallback policy not tried before.

    `reset` covers whatever happens to a request before the headers of its response, a per-try timeout included; a response
    that has begun is never tried again. Envoy 1.40 has one count for all conditions, so what kills its engine is not told apart.
    """
    tried = route.RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts",
        typed_config=protobuf.Any.pack(previous_hosts.PreviousHostsPredicate()),
    )
    return route.RetryPolicy(
        retry_on=",".join((*RETRY_ON, "reset" if envoy.retry_resets else "reset-before-request")),
        retriable_status_codes=list(envoy.retry_statuses),
        num_retries=envoy.retries,
        # Another host is tried, so there is nothing to wait for; the default of 25 ms would be most of a retry's cost.
        retry_back_off=route.RetryPolicyRetryBackOff(base_interval=seconds(0.005), max_interval=seconds(0.05)),
        retry_host_predicate=[tried],
        host_selection_retry_max_attempts=5,
    )


def _copy(cluster: str) -> route.RouteActionRequestMirrorPolicy:
    """A copy has the metadata of the request (Envoy 1.40), so only a header of its own can send it elsewhere."""
    told = core.HeaderValueOption(
        header=core.HeaderValue(
            key=names.COPY_HEADER, value=f"%DYNAMIC_METADATA({names.NAMESPACE}:{names.PREFILLER})%"
        ),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
    return route.RouteActionRequestMirrorPolicy(
        cluster=cluster,
        disable_shadow_host_suffix_append=True,
        request_headers_mutations=[mutation.HeaderMutation(append=told)],
    )


def _retries_mirrored() -> route.RetryPolicy:
    """Nothing that has begun: the two that got the request have met, and a third would wait in vain. How often comes in a header."""
    return route.RetryPolicy(
        retry_on="connect-failure",
        num_retries=0,
        retry_back_off=route.RetryPolicyRetryBackOff(base_interval=seconds(0.005), max_interval=seconds(0.05)),
    )


def _header_is(name: str, value: str) -> route.HeaderMatcher:
    return route.HeaderMatcher(name=name, string_match=matcher.StringMatcher(exact=value))


def _what_is_left(name: str) -> core.HeaderValueOption:
    """As extproc put it into the metadata of the request; nothing where it did not."""
    return core.HeaderValueOption(
        header=core.HeaderValue(key=name, value=f"%DYNAMIC_METADATA({names.NAMESPACE}:{name})%"),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
        keep_empty_value=False,
    )


def _who_answered() -> core.HeaderValueOption:
    return core.HeaderValueOption(
        header=core.HeaderValue(key=names.REPLICA_HEADER, value="%UPSTREAM_REMOTE_ADDRESS%"),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
