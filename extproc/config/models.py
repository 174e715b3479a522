"""The sections `models` and `providers` of the configuration file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, ValidationInfo, field_validator, model_validator

from extproc.config.base import Name, Seconds, Section

ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = Annotated[int, Field(ge=1)]
Quality = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64)]
Tenant = Annotated[str, Field(min_length=1)]


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
    tenants: tuple[Tenant, ...] = ()
    """Its tenant is one of these, or its tier one of `tiers`."""
    tiers: tuple[Name, ...] = ()
    """See `tenants`."""
    quality: tuple[Quality, ...] = ()
    """Its header `x-quality` has one of these values, letter by letter. May be written as one string."""
    quality_not: tuple[Quality, ...] = ()
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
        if self.quality and set(self.quality) <= set(self.quality_not):
            raise ValueError("quality_not has all of quality, so nothing would meet it")
        return self

    @property
    def rule(self) -> tuple[Any, ...]:
        """Equal for rules that say the same, however they are written."""
        values = [getattr(self, name) for name in type(self).model_fields]
        return tuple(frozenset(value) if isinstance(value, tuple) else value for value in values)


ANYTHING = WhenConfig().rule
"""The rule that every request meets."""


class TargetConfig(Section):
    """Where requests for a model go."""

    pool: Name | None = None
    """Name of a pool,"""
    provider: Name | None = None
    """or of one of `providers`."""
    model: ModelName | None = None
    """What the model is called there; the name in the request's body is replaced by it. null: a provider's own `model`, else the model's `name`."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
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

    def engine(self, name: str, providers: Mapping[str, str | None]) -> str:
        """What the model of that name is called there; `providers` are the names under which they know models, where they say."""
        return self.model or providers.get(self.provider or "") or name


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
    estimate: Literal["learned", "words"] = "learned"
    """How rules count prompt tokens: `learned` from the size and what usage has shown, or `words` of its text times 1.3, whatever was learned."""
    sticky: Literal["session", "tenant", "request"] = "session"
    """What stays with one target where several share: a session (`requests.session_header`), a tenant, or requests whose prompts begin alike. Requests without that are drawn one by one."""


class Price(Section):
    """What a provider charges, in dollars."""

    prompt_per_million: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """For a million prompt tokens."""
    output_per_million: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """For a million output tokens."""


class BudgetConfig(Section):
    """What may be spent on a provider in any 24 hours, by this router. null is no bound."""

    dollars: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """By `price`. Requests in flight count with what they are expected to cost."""
    tokens: int | None = Field(default=None, ge=0)
    """Prompt and output tokens."""
    tenant_dollars: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """As `dollars`, for each tenant by itself."""
    tenant_tokens: int | None = Field(default=None, ge=0)
    """As `tokens`, for each tenant by itself."""

    @property
    def by_tenant(self) -> bool:
        """Whether it bounds what one tenant spends."""
        return self.tenant_dollars is not None or self.tenant_tokens is not None


URL_PARTS: Final = {
    "host": (
        r"(?=.{1,253}$)\w([\w-]*\w)?(\.\w([\w-]*\w)?)*",
        "the name of a host alone, like api.example.com; a path goes to base_path",
    ),
    "base_path": (r"(/[\w.~%:@+-]+)*", "a path like /v1: with a slash at its begin and none at its end"),
    "query": (r"([\w.~%:+-]+=[\w.~%:+=&-]*)?", "a query like api-version=2024-10-21, without the question mark"),
}
"""By the name of the key: the form that its value must have, and how to say so."""


class ProviderConfig(Section):
    """An OpenAI-compatible API elsewhere. Envoy calls it, and adds the key; extproc never sees the key."""

    name: Name
    """Name in targets, metrics and Envoy's cluster name; not that of a pool."""
    host: str
    """Host name, also for TLS and the `host` header."""
    port: int = Field(default=443, ge=1, le=65535)
    """TCP port."""
    tls: bool = True
    """Whether to speak TLS, with the certificate verified for `host`."""
    ca_file: Path | None = None
    """Certificates (PEM) of the authorities that are trusted; null for those of the system."""
    base_path: str = "/v1"
    """Stands in place of `/v1`: the path of the URL that clients of the provider call its base URL. `/api/v3` makes `/api/v3/chat/completions`."""
    query: str = ""
    """Stands after `?` in every request: `api-version=2024-10-21`, say. No place for a key."""
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

    @field_validator("host", "base_path", "query")
    @classmethod
    def _of_a_url(cls, value: str, info: ValidationInfo) -> str:
        pattern, wanted = URL_PARTS[info.field_name or ""]
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"{value!r} is not {wanted}")
        return value


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


def check_limits(models: tuple[ModelConfig, ...], limited: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raises ValueError for a limit of an alias, for which nothing would be counted. `limited`: dotted path, and names of models there."""
    means = {alias: model.name for model in models for alias in model.aliases}
    for path, names in limited:
        for name in names:
            if name in means:
                raise ValueError(f"{path}: {name!r} is an alias, which counts as its model; write {means[name]!r}")


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
    for i, provider in enumerate(providers):
        if provider.budget.by_tenant and not knows_tenants:
            yield f"providers[{i}].budget: nothing tells who asks; add tenants, or requests.tenant_header"
    known: set[str] = set()
    for i, model in enumerate(models):
        for name in (model.name, *model.aliases):
            if name in known:
                yield f"models[{i}]: {name!r} is a name or alias twice; remove one"
            known.add(name)
        called = {provider.name: provider.model for provider in providers}
        yield from _of_targets(f"models[{i}].targets", model, called)
        yield from _of_fallback(f"models[{i}].fallback", model, called)
        for path, target in _targets(f"models[{i}]", model):
            yield from _of_place(path, target, pools, tuple(names))
            yield from _of_rule(f"{path}.when", target.when, tiers, knows_tenants)


def _targets(path: str, model: ModelConfig) -> Iterator[tuple[str, TargetConfig]]:
    for part in ("targets", "fallback"):
        yield from ((f"{path}.{part}[{i}]", target) for i, target in enumerate(getattr(model, part)))


def _of_targets(path: str, model: ModelConfig, called: Mapping[str, str | None]) -> Iterator[str]:
    by_rule: dict[tuple[Any, ...], list[TargetConfig]] = {}
    for target in model.targets:
        by_rule.setdefault(target.when.rule, []).append(target)
    for group in by_rule.values():
        if not sum(target.weight for target in group):
            yield f"{path}: the weights of those with the same rule come to nothing; give one of them a weight"
        places = [(target.to, target.engine(model.name, called)) for target in group]
        if doubled := next((place for i, place in enumerate(places) if place in places[:i]), None):
            yield f"{path}: {doubled[0]!r} is there twice with the same model and rule; make it one with the sum of weights"
    for i, target in enumerate(model.targets):
        before = [each.when.rule for each in model.targets[:i]]
        if target.when.rule != ANYTHING and ANYTHING in before:
            yield f"{path}[{i}].when: never looked at, for {path}[{before.index(ANYTHING)}] takes every request; put this one before it"


def _of_fallback(path: str, model: ModelConfig, called: Mapping[str, str | None]) -> Iterator[str]:
    """What is also a target may be here: with weight 0 it is a way back, and with another it is not asked twice."""
    places: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for i, target in enumerate(model.fallback):
        rules = places.setdefault((target.to, target.engine(model.name, called)), [])
        if ANYTHING in rules or target.when.rule in rules:
            yield f"{path}[{i}]: {target.to!r} is there before, for the same requests; remove it"
        rules.append(target.when.rule)


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
