"""Whether a replica that has work of ours does any: the one sign of a hung engine.

Such an engine answers its checks with 200, and its gauges say that it is idle (vLLM 0.32), so silence is judged by our own
flights: by those that the proxy still reports as running, and for which something is overdue.
"""

from __future__ import annotations

from collections.abc import Iterable

from extproc.core.flights import Flight
from extproc.core.health.settings import HealthSettings
from extproc.core.types import Api


def silence_s(flights: Iterable[Flight], heard_at: float, counted: bool, settings: HealthSettings, now: float) -> float:
    """For how many seconds the replica has been silent though something is overdue; 0 where nothing is.

    `heard_at`: its last sign of work. `counted`: its counters of tokens are known as of now, so work on a response that
    comes as a whole would show.
    """
    if now - heard_at < settings.hang_s / 2:
        return 0.0
    return max((_of(flight, heard_at, counted, settings, now) for flight in flights), default=0.0)


def _of(flight: Flight, heard_at: float, counted: bool, settings: HealthSettings, now: float) -> float:
    # 1. Without a recent report the flight may have ended long ago, its entry lost: that is no evidence. Nor is a report
    #    that came with bytes, until the next says that none were added.
    if flight.reported_at <= flight.heard_at or now - flight.reported_at > settings.hang_s / 2:
        return 0.0
    # 2. What is asked on a path that we do not read may take any time.
    if flight.api is Api.OTHER or now - flight.routed_at < _due_s(flight, counted, settings.hang_factor):
        return 0.0
    # 3. Any sign of work on the replica, for whichever request, is one.
    return now - max(heard_at, flight.heard_at)


def _due_s(flight: Flight, counted: bool, factor: float) -> float:
    """Seconds from routing after which something must have been seen of the flight: a byte, or a counter that moves."""
    if flight.stream and flight.first_token_at is not None:
        return 0.0
    first_s = factor * flight.prediction.ttft_s
    if flight.stream or counted or not flight.output_tokens:
        return first_s
    longer = max(flight.output_p90_tokens / flight.output_tokens, 1.0)
    return first_s + factor * longer * flight.prediction.decode_s
