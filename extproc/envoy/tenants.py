"""The plan of each tenant: what tiers, tenants and models say in the configuration, put together once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.config import Limits, Tenants, Tier
from extproc.core.account import Account, Most, Rate
from extproc.core.record import record

Values = Mapping[str, Any]
"""Limits by their names in the configuration. A missing one is not spoken of, None is no limit."""
Terms = tuple[Rate | None, Rate | None, Most | None, int | None]
"""The last four fields of Account."""


@record
class Plan:
    """What holds for a tenant."""

    tier: str
    label: str
    """Its name, where it is one of those that metrics may name."""
    priority: int
    """Of requests that name none, and the highest."""
    slo_ttft_s: float | None
    limits: Mapping[str | None, Terms]
    """By model; under None those of all models that name none of their own."""

    def account(self, tenant: str, model: str | None) -> Account:
        """The limits of its requests for this model. `tenant` is the hash of its name."""
        return Account(tenant, self.tier, self.label, *(self.limits.get(model) or self.limits[None]))

    def accounts(self, tenant: str) -> list[Account]:
        """Those of all models that have limits of their own, and that of the others: every meter of the tenant."""
        return [self.account(tenant, model) for model in self.limits]


def _terms(general: Values, own: Values, model: str | None) -> Terms:
    """What a model says, else what holds for all of those that do not."""

    def of(name: str) -> tuple[int | None, str | None]:
        """The limit, and the model for which it is counted apart."""
        return (own[name], model) if name in own else (general.get(name), None)

    in_flight, apart = of("in_flight")
    return (
        _rate(*of("requests_per_minute"), of("requests_burst")[0]),
        _rate(*of("tokens_per_minute"), None),
        None if in_flight is None else Most(in_flight, apart),
        of("max_prompt_tokens")[0],
    )


def _rate(per_minute: int | None, model: str | None, burst: int | None) -> Rate | None:
    if per_minute is None:
        return None
    return Rate(per_minute, per_minute if burst is None else min(burst, per_minute), model)


class Plans:
    """Plans by tier and tenant."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._of_tiers = {name: _plan(name, "", tier, None) for name, tier in tenants.tiers.items()}
        self._of_named = {
            (tier, name): _plan(tier, name if tenant.metrics else "", tenants.tiers[tier], tenant)
            for name, tenant in tenants.named.items()
            for tier in tenants.tiers
        }

    def anonymous(self) -> Plan:
        """For whoever is not known."""
        return self._of_tiers[self._tenants.anonymous_tier]

    def of(self, tenant: str, tier: str | None) -> Plan:
        """For a tenant by its name; `tier` as its key or claims name it. One that does not exist counts as not named."""
        named = self._tenants.named.get(tenant)
        if tier not in self._of_tiers:
            tier = (named.tier if named else None) or self._tenants.default_tier
        return self._of_tiers[tier] if named is None else self._of_named[(tier, tenant)]


def _plan(name: str, label: str, tier: Tier, tenant: Tier | None) -> Plan:
    says = {**_said(tier), **(_said(tenant) if tenant else {})}
    models: dict[str, Values] = {model: _said(limits) for model, limits in tier.models.items()}
    for model, limits in (tenant.models if tenant else {}).items():
        models[model] = {**models.get(model, {}), **_said(limits)}
    return Plan(
        tier=name,
        label=label,
        priority=says.get("priority", 0),
        slo_ttft_s=says.get("slo_ttft_s"),
        limits={None: _terms(says, {}, None)} | {model: _terms(says, own, model) for model, own in models.items()},
    )


def _said(limits: Limits) -> dict[str, Any]:
    """What stands in the file, and not what is only a default: null there lifts a limit."""
    said = limits.model_fields_set - {"models", "tier", "metrics"}
    return {name: getattr(limits, name) for name in said}
