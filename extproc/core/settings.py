"""What the core needs to know of a pool's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from extproc.core.admission.settings import QueueSettings
from extproc.core.health.settings import HealthSettings
from extproc.core.record import record
from extproc.core.scaling.settings import ScalingSettings


@record
class DisaggregationSettings:
    """Defaults are those of the configuration (`pools[].disaggregation`), where each is explained."""

    kv_bytes_per_token: float = 131_072.0
    bandwidth_bytes_per_s: float = 12.5e9
    latency_s: float = 0.01
    local_prefill: bool = True
    bootstrap_port: int | None = None
    """Where engines that find each other by themselves (SGLang) ask for a KV cache: both then get the same request, and each has one role.
    None where a side-car brings it."""


@record
class LoraSettings:
    """Defaults are those of the configuration (`pools[].lora`)."""

    load_s: float = 0.5
    slots: int | None = None


@record
class PoolSettings:
    """Defaults are those of the configuration (`pools[]`), where each is explained."""

    name: str
    models: tuple[str, ...] = ()
    policy: str = "predicted"
    policy_options: Mapping[str, float | int | str | bool] = field(default_factory=dict)
    scraped: bool = True
    """Whether samples are to be expected; without, members count as ready at once."""
    stale_after_s: float = 10.0
    health: HealthSettings = field(default_factory=HealthSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    scaling: ScalingSettings | None = None
    """None: nobody asks how many replicas there should be."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    ranks: int = 1
    """Data parallel ranks behind each address; above 1 each is a member of its own (`core/ranks.py`)."""
    disaggregation: DisaggregationSettings | None = None
    """None: every replica answers alone, whatever its role."""
