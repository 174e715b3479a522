"""The models and providers of the configuration as the core takes them: names resolved, tenants hashed."""

from __future__ import annotations

from collections.abc import Callable

from extproc.config import Config, ModelConfig, ProviderConfig, TargetConfig, WhenConfig
from extproc.core.catalog.settings import CatalogSettings, Estimate, Model, ProviderSettings, Sticky, Target, When


def catalog_settings(config: Config, hashed: Callable[[str], str]) -> CatalogSettings:
    """`hashed` gives the name of a tenant as requests bear it."""
    named = {provider.name: provider.model for provider in config.providers}
    return CatalogSettings(
        tuple(_model(model, named, hashed) for model in config.models),
        tuple(_provider(provider) for provider in config.providers),
    )


def _model(model: ModelConfig, named: dict[str, str | None], hashed: Callable[[str], str]) -> Model:
    def target(one: TargetConfig) -> Target:
        return Target(model.name, one.to, one.engine(model.name, named), one.weight, one.label, _when(one.when, hashed))

    return Model(
        name=model.name,
        targets=tuple(map(target, model.targets)),
        aliases=model.aliases,
        fallback=tuple(map(target, model.fallback)),
        estimate=Estimate(model.estimate),
        sticky=Sticky(model.sticky),
    )


def _when(when: WhenConfig, hashed: Callable[[str], str]) -> When:
    return When(
        prompt_tokens_below=when.prompt_tokens_below,
        prompt_tokens_at_least=when.prompt_tokens_at_least,
        output_tokens_below=when.output_tokens_below,
        output_tokens_at_least=when.output_tokens_at_least,
        tools=when.tools,
        images=when.images,
        tenants=frozenset(map(hashed, when.tenants)),
        tiers=frozenset(when.tiers),
        quality=frozenset(when.quality),
        quality_not=frozenset(when.quality_not),
    )


def _provider(provider: ProviderConfig) -> ProviderSettings:
    return ProviderSettings(
        name=provider.name,
        prompt_dollars=provider.price.prompt_per_million,
        output_dollars=provider.price.output_per_million,
        daily_dollars=provider.budget.dollars,
        daily_tokens=provider.budget.tokens,
        tenant_dollars=provider.budget.tenant_dollars,
        tenant_tokens=provider.budget.tenant_tokens,
    )
