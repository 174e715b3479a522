"""Names that extproc and the rendered bootstrap share; each is a contract with a running Envoy."""

from __future__ import annotations

LB_NAMESPACE = "envoy.lb"
"""Dynamic metadata that Envoy's override_host policy reads."""
DESTINATION = "x-gateway-destination-endpoint"
"""`ip:port[,ip:port...]`, best first: metadata key, and request header under the endpoint picker protocol."""
SERVED = "x-gateway-destination-endpoint-served"
"""Metadata key under which Envoy notes who answered in the end."""
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET = "x-gateway-destination-endpoint-subset"
"""Metadata key: the proxy restricts the candidates to these."""

NAMESPACE = "extproc"
"""Our own dynamic metadata."""
FLIGHT = "flight"
"""Key: id of the flight; joins access log entries to the ledger."""
PREFILLER = "prefiller"
"""Key: `ip:port` of the replica to which Envoy sends a copy of the request."""
STRIP_USAGE = "strip_usage"
"""Key, bool: we asked for the usage chunk, so Envoy takes it out of the stream again."""
USAGE_NAMESPACE = "extproc.usage"
"""Token counts taken from the response inside Envoy."""
PROMPT_TOKENS = "prompt_tokens"
COMPLETION_TOKENS = "completion_tokens"
CACHED_TOKENS = "cached_tokens"
BROKEN = "broken"
"""Key, bool, in the same namespace: the response said under status 200 that it failed."""

LOG_NAME = "extproc"
TTFT_TAG = "ttft_us"
"""Access log tag: microseconds from the client's request to the first byte of the response body."""
REPLICA_TTFT_TAG = "replica_ttft_us"
"""The same from the first byte sent to the replica."""

POOL_HEADER = "x-extproc-pool"
"""Request header that selects the cluster when there are several pools; removed before the replica."""
REPLICA_HEADER = "x-extproc-replica"
"""Response header, when switched on: who answered."""
RATELIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
)
"""Response headers that tell what is left to a tenant, by OpenAI's names; and keys of the same names in our metadata."""
JWT_NAMESPACE = "envoy.filters.http.jwt_authn"
"""Dynamic metadata in which Envoy's jwt_authn filter leaves the claims of a token."""
SERVICE_CLUSTER = "extproc"
"""Envoy's cluster for extproc itself."""
LOG_CLUSTER = "extproc_log"
"""The same address once more, for the access log: what ends the streams of a process that hangs must not lose entries on their way."""

PATIENCE_HEADER = "x-envoy-upstream-rq-per-try-timeout-ms"
"""Request header, milliseconds: Envoy's router gives a replica so long to begin its response, then asks the next; it takes the header away."""
MIRROR_HEADER = "x-extproc-prefill"
"""Request header, whatever its value: Envoy sends a copy of the request to `PREFILLER`, and throws its answer away."""
COPY_HEADER = "x-extproc-copy"
"""Request header, `ip:port`: Envoy tells itself by it where the copy goes."""
RETRIES_HEADER = "x-envoy-max-retries"
"""Request header: Envoy's router tries so often again; it takes the header away."""
RANK_HEADER = "x-data-parallel-rank"
"""Request header by which vLLM and SGLang are told which of their data parallel ranks is to take it."""
PREFILLER_HEADERS = ("x-prefiller-host-port", "x-llm-d-prefiller-host-port")
"""Request headers, `ip:port`: llm-d's side-car beside the replica has the prompt computed there first, and brings its KV cache. It
knows the second name since 2026, and will read no other one day."""
SIDECAR_HEADERS = (
    *PREFILLER_HEADERS,
    "x-encoder-hosts-ports",
    "x-llm-d-encoder-hosts-ports",
    "x-kv-cache-source-host-port",
    "x-llm-d-kv-cache-source-host-port",
    "x-data-parallel-host-port",
)
"""All by which that side-car is told of an address to send something to; whatever a client writes there is dropped."""
REFUSED_DETAILS = "extproc"
"""Envoy's response code details of what extproc answered itself."""

CONTROL_HEADERS = (DESTINATION, SERVED, SUBSET, POOL_HEADER, PATIENCE_HEADER, "x-vllm-priority")
"""Request headers that only we may set; Envoy removes what a client sends."""
PRIVATE_HEADERS = (
    "x-session-id",
    "x-request-priority",
    "x-slo-ttft-ms",
    "x-quality",
    "x-gateway-inference-objective",
    "x-gateway-inference-fairness-id",
)
"""Request headers for us alone; Envoy removes them before the replica."""


def cluster_name(pool: str) -> str:
    """Envoy's cluster of a pool."""
    return f"pool_{pool}"


def provider_cluster(provider: str) -> str:
    """Envoy's cluster of a provider."""
    return f"provider_{provider}"


def provider_key(provider: str) -> str:
    """Envoy's name for the API key of a provider."""
    return f"provider_{provider}_key"
