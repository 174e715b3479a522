"""The thresholds of a pool's health checks, as the core needs them."""

from __future__ import annotations

from extproc.core.record import record


@record
class HealthSettings:
    """Defaults are those of the configuration (`pools[].health`), where each is explained."""

    failures: int = 3
    """Checks or requests that fail in a row before a replica is taken out."""
    successes: int = 2
    """That succeed in a row before it is back."""
    window_s: float = 30.0
    failure_rate: float = 0.5
    """Share of the requests of the last `window_s` that failed, above which it is taken out."""
    min_requests: int = 10
    """Fewer in the window say nothing of a rate."""
    open_s: float = 1.0
    """First time out after requests failed; it doubles with each failed trial."""
    max_open_s: float = 60.0
    suspect_s: float = 2.0
    """After one failure a replica is passed over for so long, or until it is heard of again."""
    hang_s: float = 5.0
    """Least time without a sign of work, while there is work, that counts as a hang."""
    hang_factor: float = 3.0
    """A first token is overdue after so many times what was predicted, but not before `hang_s`."""
    slow_start_s: float = 10.0
    """A new or returned replica gets its full share after so long; 0 at once."""
