"""The section `tenants` of the configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from extproc.config.base import (
    Name,
    Section,
)


class Limits(Section):
    """What a tenant may take up. null is no limit."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute. So many may come at once; they come back evenly, one after a minute divided by the limit. See docs/tenants.md."""
    requests_burst: int | None = Field(default=None, ge=1)
    """Requests that may come at once; null for a minute's. 1 spaces them evenly, so that no minute has more than the limit."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt and output tokens a minute, together. Estimated when a request comes, settled by what the replica reports."""
    in_flight: int | None = Field(default=None, ge=1)
    """Requests at one time, those that wait included. Routers that share count those of the others, as far as they have heard of them."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, as estimated; above it the client gets 400."""


class Tier(Limits):
    """What the tenants of a tier may do."""

    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    """Priority of requests that name none, and the highest that they may name: a client may lower its own."""
    slo_ttft_s: float | None = Field(default=None, gt=0)
    """Seconds to the first token, for requests without `x-slo-ttft-ms`: one that cannot have it in time is refused at once. null: they wait."""
    models: dict[str, Limits] = {}
    """Limits of single models, each counted apart. What a model does not name here holds for all those together that do not."""


class Tenant(Tier):
    """A tenant by its name. What is named here takes the place of what its tier says."""

    tier: Name | None = None
    """Its tier, unless its key or claims name another; null for `default_tier`."""
    metrics: bool = False
    """Count it apart in metrics, with its name as a label."""


class JwtClaims(Section):
    """Claims of tokens that Envoy's jwt_authn filter has verified, read from the metadata that it leaves."""

    payload: str = "jwt_payload"
    """`payload_in_metadata` of the filter's provider."""
    tenant_claim: str = "sub"
    """Claim that names the tenant; with dots for one inside another (`org.id`)."""
    tier_claim: str | None = None
    """Claim that names its tier; null for none."""


class TenantSharing(Section):
    """How limits are kept by several routers together, through the Redis of `shared`. Without that each router keeps its own."""

    on_loss: Literal["open", "closed"] = "open"
    """While Redis cannot be reached: open, each router applies the limits alone; closed, whoever has limits a minute gets 503."""
    strict: bool = False
    """true: a request for which this router has nothing leased waits for Redis. Otherwise a little may pass on credit, see docs/tenants.md."""
    strict_wait_s: float = Field(default=0.1, gt=0, le=5)
    """Longest such wait in seconds; then `on_loss` decides."""


TIERS: dict[str, Tier] = {
    "free": Tier(requests_per_minute=10),
    "paid": Tier(requests_per_minute=60),
    "enterprise": Tier(),
}


class Tenants(Section):
    """Who asks, and what they may take up. Of the ways to tell who asks, claims go before keys; where either is configured the header counts for nothing, for anybody can write one."""

    secret_file: Path | None = None
    """File with 16 random characters or more that nobody else knows: the key of all hashes of API keys and tenants. All routers of a fleet need the same. null: made up at the start. `extproc key add` creates one."""
    keys_file: Path | None = None
    """File of API keys, as hashes, followed while extproc runs. Clients send `authorization: Bearer KEY` or `x-api-key: KEY`. `extproc key add` writes entries."""
    jwt: JwtClaims | None = None
    """Read claims."""
    tier_header: str | None = None
    """Header that names the tier, beside `requests.tenant_header`. For gateways in front that set both; strip them from what clients send."""
    unknown: Literal["refuse", "anonymous"] = "refuse"
    """Who has no key or claims, or unknown ones: `refuse` with 401, or serve as anonymous. All the anonymous are one tenant."""
    anonymous_tier: Name = "free"
    """Tier of the anonymous."""
    default_tier: Name = "free"
    """Tier of tenants for whom nothing names one, or names one that does not exist."""
    isolate_prefixes: bool = True
    """Prompts of one tenant count as cached only for that tenant. Where caches are known by KV events and a tokenizer, what engines share counts: see `send_cache_salt`."""
    send_cache_salt: bool = False
    """Also have the engines keep their caches apart: `cache_salt` is added to requests for chats, completions and responses. Shared system prompts are then computed once for each tenant."""
    tiers: dict[Name, Tier] = TIERS
    """Tiers by name. Those here are added to `free` (10 requests a minute), `paid` (60) and `enterprise` (no limit), or take their places."""
    named: dict[str, Tenant] = {}
    """Tenants that differ from their tier, by name."""
    sharing: TenantSharing = TenantSharing()

    @property
    def limits_in_flight(self) -> bool:
        """Whether anybody has such a limit."""
        says: list[Tier] = [*self.tiers.values(), *self.named.values()]
        limits: list[Limits] = [*says, *(model for each in says for model in each.models.values())]
        return any(each.in_flight is not None for each in limits)

    @model_validator(mode="before")
    @classmethod
    def _default_tiers(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("tiers"), dict):
            return {**value, "tiers": {**TIERS, **value["tiers"]}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted = {"anonymous_tier": self.anonymous_tier, "default_tier": self.default_tier}
        wanted |= {f"named.{name}.tier": tenant.tier for name, tenant in self.named.items() if tenant.tier}
        for key, tier in wanted.items():
            if tier not in self.tiers:
                raise ValueError(f"{key}: there is no tier {tier!r}; known: {', '.join(self.tiers)}")
        if self.keys_file and not self.secret_file:
            raise ValueError("has keys_file without secret_file; the hashes in it need the secret they were made with")
        return self
