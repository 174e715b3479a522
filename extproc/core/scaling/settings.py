"""How a pool scales, as the core needs to know it."""

from __future__ import annotations

from dataclasses import field

from extproc.core.record import record
from extproc.core.scaling.warm import WarmSettings


@record
class Thresholds:
    """Of the rule `thresholds`: up where any is crossed, down where both lower ones are."""

    queue_above: float = 50.0
    ttft_p95_above_s: float = 3.0
    gpu_above: float = 0.85
    queue_below: float = 10.0
    gpu_below: float = 0.30


@record
class ScalingSettings:
    """Defaults are those of the configuration (`pools[].scaling`), where each is explained."""

    rule: str = "work"
    min_replicas: int = 1
    max_replicas: int = 10
    ttft_target_s: float = 0.5
    """That `attainment` of the requests shall get their first token in."""
    attainment: float = 0.95
    tpot_target_s: float = 0.05
    """Per output token."""
    max_utilization: float = 0.9
    """Share of its time that a replica may be at work, whatever the SLO leaves."""
    cold_start_s: float = 120.0
    """From the wish for a replica to its first answer."""
    interval_s: float = 15.0
    up_cooldown_s: float = 60.0
    down_cooldown_s: float = 300.0
    max_step_up: int = 4
    max_step_down: int = 4
    hysteresis: float = 0.2
    """Fewer replicas must suffice for so much more work than there is."""
    change_cost_s: float = 900.0
    """Replica-seconds that may be paid for, and not needed, to save a change."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    warm: WarmSettings | None = None
    """Spare replicas; None for none."""
    daily: bool = False
    """Learn the day as it usually goes, and be ahead of it by"""
    daily_lead_s: float = 600.0

    @property
    def from_zero(self) -> bool:
        """Whether the pool may be empty, so that requests wait for its first replica."""
        return self.min_replicas == 0
