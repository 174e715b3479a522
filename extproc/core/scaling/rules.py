"""The rules by name. Each says how many replicas are needed, and how many would suffice with a margin, of what is seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from extproc.core.record import record
from extproc.core.scaling import capacity
from extproc.core.scaling.arrivals import Mix
from extproc.core.scaling.capacity import ReplicaModel
from extproc.core.scaling.settings import ScalingSettings

CLEAR_S: Final = 60.0
"""In so many seconds what waits too long already is to be worked off, beside what comes."""


@record
class Seen:
    """A pool at one moment."""

    asked: int
    """Replicas that were asked for last."""
    replicas: int
    """Members that take requests."""
    model: ReplicaModel
    mix: Mix
    """Of the last minutes, per request; no requests where none came."""
    per_s: float
    """Requests of that mix that come each second, this router's share and others' together."""
    later_per_s: float
    """The same as expected when a replica that is asked for now has started."""
    growth_per_s2: float
    """By how much that grows each second, as far as it is sure; 0 where it does not."""
    queue: float
    """Requests that wait: held here, and in the engines."""
    late_requests: float
    """Of these, more than can still be in time: those held, and queued prefill beyond the target, in requests of the mix."""
    in_flight: float
    """Requests on replicas, others' included."""
    ttft_p95_s: float | None
    """Of the last minute; None where too few came."""
    gpu: float | None
    """Use of the GPUs, 0 to 1, where somebody tells."""


@record
class Need:
    """What a rule says."""

    up_to: int
    """Needed."""
    down_to: int
    """Fewer must not be asked for."""
    settled: bool = True
    """A way down waits until nothing more was needed for a whole cooldown, and until it is worth a change; otherwise only for a
    cooldown since the last one."""
    at_once: int = 0
    """Asked for where more are needed than there are: what growth would ask for soon. Fewer than `up_to` means just that."""


Rule = Callable[[Seen, ScalingSettings], Need]


def work(seen: Seen, settings: ScalingSettings) -> Need:
    """Work that arrives, and what waits too long, over what a replica does within its SLO.

    What comes counts as of now or as of the end of a cold start, whichever is more. A 95th percentile of TTFT beyond the target
    asks for one replica more, unless one is starting already. Where nothing came nothing is needed, but for what runs still.
    Where the rate grows, a way up takes along what it will need until another change pays.
    """
    busy = 1 if seen.in_flight or seen.queue else 0
    if not seen.mix.requests:
        return Need(busy, busy)
    rate = max(seen.per_s, seen.later_per_s) + seen.late_requests / CLEAR_S
    up_to = capacity.needed(seen.model, seen.mix, rate, settings)
    down_to = capacity.needed(seen.model, seen.mix, rate * (1.0 + settings.hysteresis), settings)
    late = seen.ttft_p95_s is not None and seen.ttft_p95_s > settings.ttft_target_s
    if late and seen.replicas >= seen.asked:
        up_to = max(up_to, seen.asked + 1)
    soon = rate + seen.growth_per_s2 * _ahead_s(seen, up_to, settings)
    at_once = capacity.needed(seen.model, seen.mix, soon, settings)
    return Need(max(up_to, busy), max(down_to, up_to, busy), at_once=at_once)


def _ahead_s(seen: Seen, replicas: int, settings: ScalingSettings) -> float:
    """Seconds of growth that one change takes along.

    Replicas that are asked for all at once wait to be needed, `growth t^2 / 2` replica-seconds for `t` seconds of growth; one by
    one each is a change. Their cost per second is least where the wait costs what a change does: the economic order quantity
    (Harris 1913).
    """
    growth = seen.growth_per_s2 / capacity.per_s(seen.model, seen.mix, replicas, settings)
    return math.sqrt(2.0 * settings.change_cost_s / growth) if growth > 0 else 0.0


def thresholds(seen: Seen, settings: ScalingSettings) -> Need:
    """One more where the queue, the 95th percentile of TTFT or the GPUs are above a bound, one fewer where queue and GPUs are low.

    Unknown crosses no bound: without a figure of the GPUs there is no way down.
    """
    bounds, asked = settings.thresholds, seen.asked
    up = (
        seen.queue > bounds.queue_above
        or (seen.ttft_p95_s is not None and seen.ttft_p95_s > bounds.ttft_p95_above_s)
        or (seen.gpu is not None and seen.gpu > bounds.gpu_above)
    )
    if up:
        return Need(asked + 1, asked + 1, settled=False)
    down = seen.queue < bounds.queue_below and seen.gpu is not None and seen.gpu < bounds.gpu_below
    fewer = max(asked - 1, 0) if down else asked
    return Need(fewer, fewer, settled=False)


RULES: Final[Mapping[str, Rule]] = {"work": work, "thresholds": thresholds}


def p95(values: list[float]) -> float | None:
    """Of a list; None of fewer than twenty, of which the slowest alone would decide."""
    if len(values) < 20:
        return None
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
