"""The sections `models` and `providers` of the configuration file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from extproc.config_base import Name, Seconds, Section

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1)]


class WhenConfig(Section):
    """A rule: a request meets it when all that is named here holds."""

    prompt_tokens_below: Tokens | None = None
    """Its prompt is shorter than so many tokens, as estimated; see docs/models.md."""
    prompt_tokens_at_least: Tokens | None = None
    """Its prompt has so many tokens or more."""
    output_tokens_below: Tokens | None = None
    """Each of its answers is expected to be shorter than so many tokens."""
    output_tokens_at_least: Tokens | None = None
    """Each of its answers is expected to have so many tokens or more."""
    tools: bool | None = None
    """Whether it brings tools."""
    images: bool | None = None
    """Whether something in its messages is no text: an image, a sound, a video."""
    tenants: tuple[str, ...] = ()
    """Its tenant is one of these, or its tier one of `tiers`."""
    tiers: tuple[Name, ...] = ()
    """See `tenants`."""
    quality: tuple[str, ...] = ()
    """Its header `x-quality` has one of these values. May be written as one string."""
    quality_not: tuple[str, ...] = ()
    """Its header `x-quality` has none of these values, or is not there."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """One value needs no list."""
        if not isinstance(value, dict):
            return value
        listed = ("tenants", "tiers", "quality", "quality_not")
        return {k: [v] if k in listed and isinstance(v, str) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for what in ("prompt_tokens", "output_tokens"):
            least, below = getattr(self, f"{what}_at_least"), getattr(self, f"{what}_below")
            if least is not None and below is not None and least >= below:
                raise ValueError(f"{what}_at_least {least} is not below {what}_below {below}, so nothing would meet it")
        return self


class TargetConfig(Section):
    """Where requests for a model go."""

    pool: Name | None = None
    """Name of a pool,"""
    provider: Name | None = None
    """or of one of `providers`."""
    model: ModelName | None = None
    """What the model is called there; the name in the request's body is replaced by it. null: a provider's own `model`, else the model's `name`."""
    weight: float = Field(default=1.0, ge=0)
    """Share among the targets with the same `when`. 0: nothing."""
    label: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]{0,63}$")
    """Label `version` in metrics."""
    when: WhenConfig = WhenConfig()
    """For which requests. The first target that a request meets decides, and all with the same rule share; without a rule every request meets it."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.pool is None) == (self.provider is None):
            said = "neither pool nor provider; add one" if self.pool is None else "both pool and provider; keep one"
            raise ValueError(f"names {said}")
        return self

    @property
    def to(self) -> str:
        """The name of the pool or provider."""
        return self.pool or self.provider or ""


class ModelConfig(Section):
    """A model by the name that clients ask for."""

    name: ModelName
    """Value of `model` in requests."""
    aliases: tuple[ModelName, ...] = ()
    """Other names for it."""
    targets: tuple[TargetConfig, ...] = Field(min_length=1)
    """Where its requests go."""
    fallback: tuple[TargetConfig, ...] = ()
    """Where they go, in this order, when no target can serve them: nobody is there or all are out, the queue is full, or the wait would be too long. `when` says for whom; `weight` says nothing."""
    sticky: Literal["session", "tenant", "request"] = "session"
    """What stays with one target where several share: a session (`requests.session_header`), a tenant, or requests whose prompts begin alike. Requests without that are drawn one by one."""


class Price(Section):
    """What a provider charges, in dollars."""

    prompt_per_million: float = Field(default=0.0, ge=0)
    """For a million prompt tokens."""
    output_per_million: float = Field(default=0.0, ge=0)
    """For a million output tokens."""


class BudgetConfig(Section):
    """What may be spent on a provider in any 24 hours, by this router. null is no bound."""

    dollars: float | None = Field(default=None, ge=0)
    """By `price`. Requests in flight count with what they are expected to cost."""
    tokens: int | None = Field(default=None, ge=0)
    """Prompt and output tokens."""


class ProviderConfig(Section):
    """An OpenAI-compatible API elsewhere. Envoy calls it, and adds the key; extproc never sees the key."""

    name: Name
    """Name in targets, metrics and Envoy's cluster name; not that of a pool."""
    host: str = Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,252})$")
    """Host name, also for TLS and the `host` header."""
    port: int = Field(default=443, ge=1, le=65535)
    """TCP port."""
    tls: bool = True
    """Whether to speak TLS, with the certificate verified for `host`."""
    ca_file: Path | None = None
    """Certificates (PEM) of the authorities that are trusted; null for those of the system."""
    path_prefix: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~/-]*[A-Za-z0-9._~-])?$")
    """Stands before the path: `/openai` makes `/openai/v1/chat/completions`. Empty for none."""
    model: ModelName | None = None
    """What the model is called there, for targets that do not say."""
    api_key_file: Path | None = None
    """File with the API key and nothing else, read by Envoy. null: no key is sent."""
    api_key_header: str = Field(default="authorization", pattern=r"^[a-z0-9]([a-z0-9-]{0,62})$")
    """Header that bears the key: `authorization` after the word `Bearer`, any other (`api-key`, say) as it is."""
    price: Price = Price()
    budget: BudgetConfig = BudgetConfig()
    timeout_s: Seconds = 600.0
    """Seconds without a byte before Envoy gives a request there up."""


# --- what holds between them and the rest of the file --------------------------------------------------------------------


def check(
    models: tuple[ModelConfig, ...],
    providers: tuple[ProviderConfig, ...],
    pools: tuple[str, ...],
    tiers: tuple[str, ...] | None,
    knows_tenants: bool,
) -> None:
    """Raises ValueError, with the dotted path and the remedy, for what does not fit together. `tiers` is None where there are no tenants."""
    for mistake in _mistakes(models, providers, pools, tiers, knows_tenants):
        raise ValueError(mistake)


def _mistakes(
    models: tuple[ModelConfig, ...],
    providers: tuple[ProviderConfig, ...],
    pools: tuple[str, ...],
    tiers: tuple[str, ...] | None,
    knows_tenants: bool,
) -> Iterator[str]:
    names = [provider.name for provider in providers]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"providers[{i}].name: two are called {name!r}; rename one"
        if name in pools:
            yield f"providers[{i}].name: a pool is called {name!r} as well; rename one"
    known: set[str] = set()
    for i, model in enumerate(models):
        for name in (model.name, *model.aliases):
            if name in known:
                yield f"models[{i}]: {name!r} is a name or alias twice; remove one"
            known.add(name)
        yield from _of_targets(f"models[{i}]", model)
        for path, target in _targets(f"models[{i}]", model):
            yield from _of_place(path, target, pools, tuple(names))
            yield from _of_rule(f"{path}.when", target.when, tiers, knows_tenants)


def _targets(path: str, model: ModelConfig) -> Iterator[tuple[str, TargetConfig]]:
    for part in ("targets", "fallback"):
        yield from ((f"{path}.{part}[{i}]", target) for i, target in enumerate(getattr(model, part)))


def _of_targets(path: str, model: ModelConfig) -> Iterator[str]:
    by_rule: dict[str, list[TargetConfig]] = {}
    for target in model.targets:
        by_rule.setdefault(target.when.model_dump_json(), []).append(target)
    for group in by_rule.values():
        if not sum(target.weight for target in group):
            yield f"{path}.targets: the weights of those with the same rule come to nothing; give one of them a weight"
        places = [(target.to, target.model) for target in group]
        if doubled := next((place for i, place in enumerate(places) if place in places[:i]), None):
            yield f"{path}.targets: {doubled[0]!r} is there twice with the same model and rule; make it one with the sum of weights"
    places = [(target.to, target.model) for target in model.targets if not target.when.model_fields_set]
    for i, target in enumerate(model.fallback):
        if (target.to, target.model) in places:
            yield f"{path}.fallback[{i}]: {target.to!r} is a target already, and would be asked twice; remove it"
        places.append((target.to, target.model))


def _of_place(path: str, target: TargetConfig, pools: tuple[str, ...], providers: tuple[str, ...]) -> Iterator[str]:
    kind, known = ("pool", pools) if target.pool is not None else ("provider", providers)
    if target.to not in known:
        listed = f"known: {', '.join(known)}" if known else f"add it to {kind}s"
        yield f"{path}.{kind}: there is no {kind} {target.to!r}; {listed}"


def _of_rule(path: str, when: WhenConfig, tiers: tuple[str, ...] | None, knows_tenants: bool) -> Iterator[str]:
    if when.tenants and not knows_tenants:
        yield f"{path}.tenants: nothing tells who asks; add tenants, or requests.tenant_header"
    for tier in when.tiers:
        if tiers is None:
            yield f"{path}.tiers: there are no tiers; add tenants"
        elif tier not in tiers:
            yield f"{path}.tiers: there is no tier {tier!r}; known: {', '.join(tiers)}"
