"""The bounds of a pool's queue, as the core needs them."""

from __future__ import annotations

from extproc.core.record import record


@record
class QueueSettings:
    """Defaults are those of the configuration (`pools[].queue`), where each is explained."""

    enabled: bool = True
    hold_above_s: float = 0.5
    """A request is held while every candidate would let it wait for longer than this."""
    max_requests: int = 1000
    max_bytes: int = 256 * 1024 * 1024
    max_wait_s: float = 30.0
    absent_wait_s: float = 10.0
    """While no replica can be reached at all; 0 refuses at once."""
    starved_after_s: float = 5.0
    """A request that waited for so long may go before those of a higher priority,"""
    starved_share: float = 0.1
    """with at most this share of what is sent off."""
    ageing: float = 0.1
    """Seconds of prefill by which a waiting request seems shorter for each second that it waits."""
