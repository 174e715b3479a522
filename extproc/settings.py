"""From sections of the configuration to what the core and the adapters are told."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from extproc.adapters.engines import CHOICES, health_paths
from extproc.adapters.probing import Checks
from extproc.adapters.scraping import Target
from extproc.config import (
    DisaggregationConfig,
    PoolConfig,
    Scaling,
    Section,
)
from extproc.core.admission.settings import QueueSettings
from extproc.core.health.settings import HealthSettings
from extproc.core.scaling.settings import ScalingSettings, Thresholds
from extproc.core.scaling.warm import WarmSettings
from extproc.core.settings import DisaggregationSettings, LoraSettings, PoolSettings


def settings(pool: PoolConfig) -> PoolSettings:
    """The core's view of a pool's configuration."""
    return PoolSettings(
        name=pool.name,
        models=pool.models,
        policy=pool.policy,
        policy_options=pool.policy_options,
        scraped=pool.engine != "none",
        stale_after_s=pool.scrape.stale_after_s,
        health=HealthSettings(**_shared(HealthSettings, pool.health)),
        queue=QueueSettings(**{**_shared(QueueSettings, pool.queue), "absent_wait_s": pool.absent_wait_s}),
        scaling=_scaling(pool.scaling),
        lora=LoraSettings(pool.lora.load_s, pool.lora.slots),
        ranks=pool.data_parallel,
        disaggregation=_disaggregation(pool.disaggregation),
    )


def _disaggregation(section: DisaggregationConfig | None) -> DisaggregationSettings | None:
    if section is None:
        return None
    return DisaggregationSettings(
        kv_bytes_per_token=section.kv_bytes_per_token,
        bandwidth_bytes_per_s=section.bandwidth_gbit_per_s * 1e9 / 8,
        latency_s=section.latency_s,
        local_prefill=section.local_prefill,
        bootstrap_port=section.bootstrap_port if section.mirrors else None,
    )


def gpu_url(pool: PoolConfig) -> str | None:
    """Where the use of the pool's GPUs as a whole is told."""
    return pool.scaling.gpu_url if pool.scaling is not None else None


def _scaling(section: Scaling | None) -> ScalingSettings | None:
    if section is None:
        return None
    bounds = Thresholds(**_shared(Thresholds, section.thresholds))
    warm = WarmSettings(**_shared(WarmSettings, section.warm)) if section.warm else None
    return ScalingSettings(**{**_shared(ScalingSettings, section), "thresholds": bounds, "warm": warm})


def target(pool: PoolConfig) -> Target:
    """How the metrics of its replicas are read."""
    return Target(CHOICES[pool.engine], pool.scrape, pool.data_parallel)


def checks_of(pool: PoolConfig) -> Checks:
    """How its replicas are checked."""
    return Checks(pool.health, pool.models, health_paths(CHOICES[pool.engine] or CHOICES["auto"]))


def _shared(record: type[Any], section: Section) -> dict[str, Any]:
    """The values of a section that the core's settings name as well."""
    return {field.name: getattr(section, field.name) for field in fields(record)}
