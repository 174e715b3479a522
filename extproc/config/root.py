"""The configuration file as a whole, and its smaller sections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from extproc import redis_url
from extproc.config import models
from extproc.config.base import (
    Address,
    Listener,
    Seconds,
    Section,
    first_doubled,
)
from extproc.config.models import ModelConfig, ProviderConfig
from extproc.config.pools import (
    PoolConfig,
)
from extproc.config.tenants import Tenants

READING_LIMIT_S = 10.0
"""Longest time until a large body is read, the wait for a reader included."""


class Listen(Section):
    """Where extproc itself listens. Both default to loopback: neither port has authentication."""

    grpc: Listener = "127.0.0.1:9002"
    """Envoy's gRPC: ext_proc, access log and health. `ip:port`, or `unix:/path` for a socket."""
    http: Listener = "127.0.0.1:9003"
    """Metrics, probes and inspection over HTTP. `ip:port` or `unix:/path`."""


class Requests(Section):
    """What is read from requests."""

    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """Largest request body in bytes; above it the client gets 413."""
    max_buffered_bytes: int = Field(default=512 * 1024 * 1024, ge=1024)
    """Most bytes of request bodies in this process at one time, held ones included; beyond, further requests are refused with 503."""
    max_json_depth: int = Field(default=128, ge=8, le=1000)
    """Deepest nesting of a request body; above it the client gets 400."""
    max_prompt_blocks: int = Field(default=1024, ge=16, le=1024)
    """Most blocks of a prompt that are hashed; what comes after them is not looked up in the prefix index."""
    large_body_bytes: int = Field(default=128 * 1024, ge=1024)
    """A body above this many bytes is read in a process of its own, so that it does not stall others."""
    max_flights: int = Field(default=100_000, ge=1)
    """Most requests in flight; beyond, further ones are refused with 503."""
    session_header: str = "x-session-id"
    """Header that names a session, for `session_affinity`. Stripped before the replica."""
    tenant_header: str | None = None
    """Header that names who asks (an API key, say). Only a keyed hash of it is kept."""
    objectives: dict[str, Annotated[int, Field(ge=-1_000_000, le=1_000_000)]] = {}
    """Name of an InferenceObjective: priority, the higher first. With any, the header `x-llm-d-inference-objective` (or `x-gateway-inference-objective`) gives a request its priority where `x-request-priority` does not; a name that is not here counts as none."""
    flight_ttl_s: Seconds = 30.0
    """A flight of which nothing was heard for this many seconds is closed as lost. Periodic entries of the access log renew it, and so does a response that is awaited here (docs/interplay.md), so it may be shorter than the longest generation; where a proxy sends none, set it above that."""


class EnvoyConfig(Section):
    """The Envoy bootstrap that `extproc envoy` renders."""

    listen: Listener = "0.0.0.0:10000"
    """Where Envoy takes requests."""
    admin: Address | None = "127.0.0.1:9901"
    """Envoy's admin interface; null for none."""
    endpoints_file: Path = Path("/var/lib/extproc/endpoints.json")
    """File of members and their health that extproc writes and Envoy watches. Both need the same path; its directory must exist. With several pools each has its own, with the pool's name before the suffix (`endpoints.<pool>.json`): Envoy takes one cluster from a file."""
    bootstrap_file: Path = Path("envoy.json")
    """Where `extproc envoy` writes the bootstrap."""
    fail_open: bool | None = None
    """When extproc does not answer, let requests pass by least request over the last known members. false: they fail with 503, or with 504 while extproc hangs and Envoy has not noticed. null: true, but false where `tenants.unknown` is `refuse`, for nobody is known then."""
    message_timeout_s: Seconds = 0.5
    """Seconds that Envoy waits for one answer of extproc."""
    connect_timeout_s: Seconds = 0.25
    """Seconds for a TCP connection to a replica."""
    endpoints: int = Field(default=3, ge=1, le=3)
    """Replicas that an answer names, best first: the others are for retries. 1 for gateways that take the pick for one address, as those do that route by an original destination cluster (Envoy AI Gateway)."""
    retries: int = Field(default=2, ge=0, le=5)
    """Attempts on further replicas, for all reasons together: no connection, a stream that was refused, and what the next two keys name. A request that kills the engine that runs it kills at most one more than this."""
    retry_resets: bool = True
    """Also send a request elsewhere whose replica died, or kept silent beyond all patience, before the headers of its response: a generation can be repeated. false: only where the request had not been sent; a request that kills engines then kills one."""
    retry_statuses: tuple[Annotated[int, Field(ge=500, le=599)], ...] = (500, 502, 503)
    """Statuses of a replica after which the next is asked. 500 is among them because vLLM answers so while it shuts down or its engine is dead; a fault of the request itself is then repeated `retries` times. 504 is not: whoever gave up waiting in front of the engine would be kept waiting again."""
    stream_idle_timeout_s: Seconds = 600.0
    """Seconds without a byte in either direction before Envoy gives a request up."""
    progress_interval_s: float | None = Field(default=1.0, ge=0.1)
    """Seconds between the access log entries of a request that still runs: first token seen, bytes so far. null for none."""
    log_flush_interval_s: Seconds = 0.1
    """Longest time that Envoy keeps access log entries back to batch them, seconds."""
    disabled_paths: tuple[str, ...] = ("/health", "/ping", "/v1/realtime")
    """Path prefixes that never go through extproc: probes, and upgrades, which ext_proc cannot carry."""
    response_headers: bool = False
    """Add `x-extproc-replica` (who answered) to responses."""
    access_log: Path | None = None
    """Also write Envoy's access log to this file, one JSON object a line; /dev/stdout works. null for none."""


class SharedTls(Section):
    """TLS to Redis: with `rediss` URLs."""

    ca_file: Path | None = None
    """Certificates (PEM) of the authorities that are trusted; null for those of the system."""
    cert_file: Path | None = None
    """Our own certificate (PEM), where the server asks for one."""
    key_file: Path | None = None
    """Its key."""
    check_hostname: bool = True
    """Whether the server's certificate has to name the host of the URL. It is verified in any case."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("has one of cert_file and key_file; a certificate needs its key, so name both or none")
        return self


class Shared(Section):
    """What several routers of one fleet tell one another through Redis. Requests never wait for it, and go on without it."""

    url: str = Field(repr=False)
    """`redis://host:6379`, `unix:///path`, `redis+sentinel://host:26379,host/service`, `redis+cluster://host,host`; `rediss` in the place of `redis` for TLS. It may have `user:password@`, percent-encoded."""
    username: str | None = None
    """ACL user, unless the URL names one; null for the default user."""
    password_file: Path | None = None
    """File with the password and nothing else; read again for each connection, so that it may change."""
    password_env: str | None = None
    """Environment variable with the password."""
    sentinel_auth: bool = False
    """Whether the Sentinels want the same user and password."""
    tls: SharedTls = SharedTls()
    prefix: str = Field(default="extproc", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,62}$")
    """First part of all keys. Fleets that share a Redis need one each; routers share what they know when this and the names of their pools are the same."""
    beat_s: float = Field(default=0.5, ge=0.02, le=1.0)
    """Seconds between two beats: at each this router publishes what it has, and reads what all others have."""
    push: bool = True
    """Whether routers also tell one another at once what they placed (PUBLISH and SUBSCRIBE)."""
    push_interval_s: float = Field(default=0.005, ge=0.001, le=1.0)
    """Least seconds between two pushes of this router; more where there are so many routers that each would hear over 400 a second."""
    beat_without_push_s: float = Field(default=0.05, ge=0.02, le=1.0)
    """Seconds between two beats, if that is less than `beat_s`, while pushes do not reach all routers."""
    expiry_s: float = Field(default=2.0, gt=0, le=5.0)
    """Seconds after which a router that published nothing is forgotten, with its load."""
    timeout_s: float = Field(default=0.5, ge=0.05)
    """Seconds that one beat may take, connecting included."""
    max_pause_s: float = Field(default=5.0, ge=0.1)
    """Most seconds between two tries while Redis cannot be used; the pause begins with two beats and doubles."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            parsed = redis_url.parse(self.url)
        except ValueError as e:
            raise ValueError(f"url {e}") from None
        if self.tls != SharedTls() and not parsed.tls:
            raise ValueError("has tls, but a url without it; write rediss in the place of redis")
        if sum(given is not None for given in (parsed.password, self.password_file, self.password_env)) > 1:
            raise ValueError("has several passwords; keep one of url, password_file and password_env")
        if parsed.username and self.username:
            raise ValueError("has two users, in url and in username; keep one")
        if self.expiry_s < 3 * self.beat_s:
            raise ValueError(f"expiry_s: {self.expiry_s:g} is less than three beats; set {3 * self.beat_s:g} or more")
        if self.timeout_s >= self.expiry_s:
            raise ValueError(f"timeout_s: {self.timeout_s:g} is not below expiry_s; set less than {self.expiry_s:g}")
        return self


class Inspect(Section):
    """What is kept to look at."""

    decisions: int = Field(default=1000, ge=0, le=100_000)
    """Decisions kept in memory for `/debug/decisions`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity of log lines."""


class Config(Section):
    """The whole file."""

    listen: Listen = Listen()
    pools: tuple[PoolConfig, ...] = Field(min_length=1)
    """Groups of replicas. A request goes to the pool that serves its model; one that names no model to the first pool."""
    models: tuple[ModelConfig, ...] = ()
    """Models by name, with rules, shares and fallbacks, where it takes more than what pools list. See docs/models.md."""
    providers: tuple[ProviderConfig, ...] = ()
    """APIs elsewhere that targets of `models` may name."""
    requests: Requests = Requests()
    envoy: EnvoyConfig = EnvoyConfig()
    shared: Shared | None = None
    """State shared with the other routers of the fleet; null for none. See docs/redis.md."""
    tenants: Tenants | None = None
    """Tenants and their limits; null for none: everybody is served alike. See docs/tenants.md."""
    inspect: Inspect = Inspect()
    shutdown_grace_s: float = Field(default=30.0, gt=0)
    """Seconds after SIGTERM in which held requests and open answers may finish. Give the orchestrator a few seconds more."""

    @property
    def knows_all(self) -> bool:
        """Whether nobody is served who is not known."""
        return self.tenants is not None and self.tenants.unknown == "refuse"

    @property
    def fails_open(self) -> bool:
        """Whether requests pass unrouted while extproc does not answer Envoy."""
        return not self.knows_all if self.envoy.fail_open is None else self.envoy.fail_open

    @property
    def undecided_pass(self) -> bool:
        """Whether a request passes unrouted that extproc could not decide on: after a mistake of its own, or at its end."""
        return self.fails_open and not self.knows_all

    @property
    def names_cluster(self) -> bool:
        """Whether answers to Envoy name the pool or provider: where there is more than one."""
        return len(self.pools) + len(self.providers) > 1

    @property
    def hold_limit_s(self) -> float:
        """Longest time for which a request may be kept: to be read, to have its turn, and some seconds for what surrounds that."""
        waits = (max(p.queue.max_wait_s, p.absent_wait_s) for p in self.pools if p.queue.enabled)
        return max(waits, default=0.0) + READING_LIMIT_S + 5.0

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if doubled := first_doubled(p.name for p in self.pools):
            raise ValueError(f"pools: two are called {doubled!r}; rename one")
        if self.tenants is not None:
            _check_tenants(self.tenants, self.requests, self.shared)
        if doubled := first_doubled(m for p in self.pools for m in set(p.models)):
            raise ValueError(f"pools: model {doubled!r} is in two pools; name it in one")
        if doubled := first_doubled(r.address for p in self.pools for r in p.replicas):
            raise ValueError(f"pools: replica {doubled} is in two pools; list it in one")
        waits, answer_s = [p for p in self.pools if p.tokenizer], self.envoy.message_timeout_s
        if late := next((p for p in waits if p.tokenizer and p.tokenizer.timeout_s >= answer_s), None):
            raise ValueError(
                f"pools: {late.name!r} has a tokenizer.timeout_s that is not below envoy.message_timeout_s, {answer_s:g}; the proxy would give up first"
            )
        interval, ttl = self.envoy.progress_interval_s, self.requests.flight_ttl_s
        if interval is None and ttl < 600:
            raise ValueError(
                f"requests.flight_ttl_s: {ttl:g} would lose long generations while envoy.progress_interval_s is null; set 600 or more"
            )
        if interval is not None and ttl < 3 * interval:
            raise ValueError(
                f"requests.flight_ttl_s: {ttl:g} is less than three envoy.progress_interval_s; set {3 * interval:g} or more"
            )
        tiers = None if self.tenants is None else tuple(self.tenants.tiers)
        knows_tenants = self.tenants is not None or self.requests.tenant_header is not None
        models.check(self.models, self.providers, tuple(p.name for p in self.pools), tiers, knows_tenants)
        if self.tenants is not None:
            models.check_limits(self.models, _limited(self.tenants))
        aimed_at = {target.pool for model in self.models for target in (*model.targets, *model.fallback)}
        if len(self.pools) > 1 and (bare := [p.name for p in self.pools if not p.models and p.name not in aimed_at]):
            otherwise = ", or to be a target of models" if self.models else ""
            raise ValueError(
                f"pools: {bare[0]!r} names no models; with several pools each needs models: [...]{otherwise}"
            )
        return self


def _limited(tenants: Tenants) -> Iterator[tuple[str, Iterable[str]]]:
    """Where models have limits: dotted path, and their names."""
    yield from ((f"tenants.tiers.{name}.models", tier.models) for name, tier in tenants.tiers.items())
    yield from ((f"tenants.named.{name}.models", tenant.models) for name, tenant in tenants.named.items())


def _check_tenants(tenants: Tenants, requests: Requests, shared: Shared | None) -> None:
    """Raises ValueError where the section does not fit the others."""
    told = tenants.keys_file or tenants.jwt or requests.tenant_header
    if not told and tenants.unknown == "refuse":
        raise ValueError(
            "tenants: nothing tells who asks, so all would be refused; add keys_file, jwt or requests.tenant_header, or set unknown: anonymous"
        )
    if shared is not None and not tenants.secret_file:
        raise ValueError(
            "tenants: has no secret_file, so that routers that share would not know the same tenants; add one"
        )
