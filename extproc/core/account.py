"""Who a request is counted for, what it may take up, and what of that is left: values, without any counting."""

from __future__ import annotations

from extproc.core.record import record

PERIOD_S = 60.0
"""Limits are per minute."""


@record
class Rate:
    """So much per minute."""

    per_minute: float
    burst: float
    """What may come at once after a pause."""
    model: str | None = None
    """Counted apart, for this model alone; None with all models that are not."""

    @property
    def interval_s(self) -> float:
        """Seconds in which one unit comes back."""
        return PERIOD_S / self.per_minute


@record
class Most:
    """So many at one time."""

    count: int
    model: str | None = None
    """As in Rate."""


@record
class Account:
    """Who a request is counted for, and the limits that hold for its model. None is no limit."""

    tenant: str
    """Keyed hash of the tenant's name, the same on every router that has the same secret."""
    tier: str
    """A name of the configuration, so it may be a metric label."""
    label: str = ""
    """The tenant's name where the configuration has it as a metric label, else empty."""
    requests: Rate | None = None
    tokens: Rate | None = None
    """Prompt and output tokens together."""
    in_flight: Most | None = None
    max_prompt_tokens: int | None = None


@record
class Quota:
    """What is left of one limit."""

    limit: int
    """As configured, per minute."""
    remaining: int
    reset_s: float
    """Until all of it is there again, if nothing more comes."""


@record
class Allowance:
    """What is left to a tenant after a request, for the headers of the answer. None where there is no limit."""

    requests: Quota | None = None
    tokens: Quota | None = None
