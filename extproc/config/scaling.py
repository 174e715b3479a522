"""The section `pools[].scaling`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from extproc.config.base import (
    Seconds,
    Section,
)


class Thresholds(Section):
    """Bounds of the rule `thresholds`."""

    queue_above: float = Field(default=50.0, ge=0)
    """One replica more where more requests wait, here and in the engines together,"""
    ttft_p95_above_s: float = Field(default=3.0, gt=0)
    """or where the 95th percentile of TTFT over the last minute is longer, in seconds,"""
    gpu_above: float = Field(default=0.85, gt=0, le=1)
    """or where GPU use is above this share."""
    queue_below: float = Field(default=10.0, ge=0)
    """One replica fewer where fewer requests wait, and"""
    gpu_below: float = Field(default=0.30, ge=0, le=1)
    """GPU use is below this share. Where `gpu_url` is null it is unknown, and there is no way down."""


class Warm(Section):
    """Spare replicas, which take requests like any other. Those that are no longer needed stay for a while before they are given up."""

    min_replicas: int = Field(default=2, ge=0)
    """Spares that are always there, beside the replicas that are needed."""
    max_replicas: int = Field(default=5, ge=0)
    """Most spares."""
    ttl_s: Seconds = 3600.0
    """Seconds for which a replica that is no longer needed stays as a spare."""


class Scaling(Section):
    """How many replicas the pool should have. Said in metrics and to KEDA; nothing is started or stopped here. See docs/autoscaling.md."""

    rule: Literal["work", "thresholds"] = "work"
    """`work`: the work that arrives, over what a replica does within its SLO. `thresholds`: one replica more or fewer where bounds are crossed."""
    min_replicas: int = Field(default=1, ge=0)
    """Least number. 0: the pool may be empty, and requests wait while its first replica starts."""
    max_replicas: int = Field(default=10, ge=1, le=10_000)
    """Greatest number."""
    ttft_target_s: Seconds = 0.5
    """Seconds in which a share `attainment` of the requests shall get their first token."""
    attainment: float = Field(default=0.95, gt=0, lt=1)
    """That share."""
    tpot_target_s: Seconds = 0.05
    """Seconds from one output token to the next that are good enough: bounds how many requests a replica decodes together."""
    max_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of its time that a replica may be at work, whatever the SLO leaves."""
    cold_start_s: float = Field(default=120.0, ge=0)
    """Seconds from the wish for a replica to its first answer: so far ahead growth is reckoned with. About 120 for a 7B model, 300 to 900 for 70B."""
    start_wait_s: float = Field(default=180.0, ge=0, le=3600)
    """With `min_replicas: 0`: longest wait in seconds for the first replica; then 503."""
    interval_s: Seconds = 15.0
    """Seconds between two looks."""
    up_cooldown_s: float = Field(default=60.0, ge=0)
    """Seconds between a way up and the next."""
    down_cooldown_s: float = Field(default=300.0, ge=0)
    """Seconds between a change and a way down. `work` also wants that no more was needed during all of them."""
    max_step_up: int = Field(default=4, ge=1)
    """Most replicas more at one time."""
    max_step_down: int = Field(default=4, ge=1)
    """Most replicas fewer at one time."""
    hysteresis: float = Field(default=0.2, ge=0, le=1)
    """Fewer replicas are asked for only where they would suffice for so much more work, as a share of what there is."""
    change_cost_s: float = Field(default=900.0, ge=0, le=86_400)
    """Replica-seconds that may be paid for, and not needed, to save a change of the number: `work` goes down when replicas that were not needed have cost so much, and goes up by what growth will need until then. 0: every change at once, for the fewest replica-hours."""
    thresholds: Thresholds = Thresholds()
    warm: Warm | None = None
    """Spare replicas; null for none."""
    daily: bool = False
    """Learn over days how many requests are usual at what time, and have replicas ready before they come. Learned in memory: a restart begins anew."""
    daily_lead_s: float = Field(default=600.0, ge=0, le=7200)
    """So many seconds before."""
    gpu_url: str | None = Field(default=None, pattern=r"^https?://")
    """Page with `DCGM_FI_DEV_GPU_UTIL` of the pool's GPUs (a DCGM exporter's, say): their mean is the GPU use of `thresholds`. null: the mean over the replicas where the pool has `gpu`, else unknown."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}; lower it")
        if self.warm is not None and self.min_replicas == 0:
            raise ValueError("has both min_replicas: 0 and warm, which is never empty; keep one")
        return self
