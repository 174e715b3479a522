"""Work that arrives at a pool, in seconds of a replica's time per second: how much, and how surely it grows."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

BUCKET_S: Final = 15.0
BUCKETS: Final = 20
"""Five minutes: in less, chance looks like a trend; in more, a trend begins to bend."""
RECENT: Final = 4
"""Buckets of which the mean is the present rate: one minute."""


@dataclass(slots=True)
class Mix:
    """Sums over requests, or, divided by seconds, rates. What a replica can do depends on the proportions."""

    requests: float = 0.0
    uncached_tokens: float = 0.0
    """Of prompts, to be computed."""
    fill_s: float = 0.0
    """By which prompts lengthen the steps that take them in: their share of a replica that decodes anyway."""
    prefill_s: float = 0.0
    """From the beginning of a prefill to its first token, the step's fixed part included: what those behind it wait."""
    prefill_square_s2: float = 0.0
    output_tokens: float = 0.0
    context_tokens: float = 0.0
    """Context of each output token, summed: over `output_tokens` it is what a decoding sequence holds of the KV cache."""

    def add(self, other: Mix, times: float = 1.0) -> None:
        """Take in so many times another."""
        self.requests += times * other.requests
        self.uncached_tokens += times * other.uncached_tokens
        self.fill_s += times * other.fill_s
        self.prefill_s += times * other.prefill_s
        self.prefill_square_s2 += times * other.prefill_square_s2
        self.output_tokens += times * other.output_tokens
        self.context_tokens += times * other.context_tokens

    def scaled(self, times: float) -> Mix:
        """So many times as much, in the same proportions."""
        scaled = Mix()
        scaled.add(self, times)
        return scaled


@dataclass(frozen=True, slots=True)
class Trend:
    """Where the rate is going. A falling one is not foretold; it shows soon enough."""

    per_s: float
    """Requests a second, now."""
    growth_per_s2: float
    """By how much that grows each second, less one standard error: what chance alone gives a rate that does not grow."""

    def per_s_in(self, lead_s: float) -> float:
        """Requests a second in so many seconds."""
        return self.per_s + self.growth_per_s2 * lead_s


class Arrivals:
    """What arrived in the last minutes, in buckets counted from the first moment that is told of, so that none is cut.

    Bounded: one bucket for each 15 seconds of five minutes.
    """

    __slots__ = ("_began_at", "_buckets", "_current", "_index")

    def __init__(self) -> None:
        self._buckets: deque[Mix] = deque(maxlen=BUCKETS)
        self._current = Mix()
        self._index = 0
        """Of the current bucket."""
        self._began_at: float | None = None

    def __repr__(self) -> str:
        return f"<arrivals {len(self._buckets)} buckets, {self._current.requests:.0f} requests in this one>"

    def arrived(self, work: Mix, now: float) -> None:
        """A request came, or several."""
        self._advance(now)
        self._current.add(work)

    def mix(self, now: float) -> Mix:
        """Proportions of what came in the last five minutes, per request; empty where nothing did."""
        self._advance(now)
        total = Mix()
        for bucket in (*self._buckets, self._current):
            total.add(bucket)
        return total.scaled(1.0 / total.requests) if total.requests else total

    def per_s(self, now: float) -> float:
        """Requests a second, of the mix of the last five minutes, that are as much work as what came in the last minute."""
        weights, mix = self._weights(now)
        recent = weights[-RECENT:]
        return sum(recent) / len(recent) / BUCKET_S if recent and mix.requests else self._first_rate(now)

    def trend(self, now: float) -> Trend:
        """The line through the last minutes, with as much of its growth as is sure; level at the present rate in the first two."""
        weights, mix = self._weights(now)
        if len(weights) < 2 * RECENT or not mix.requests:
            return Trend(self.per_s(now), 0.0)
        level, slope, error = _line(weights)
        return Trend(max(level, 0.0) / BUCKET_S, max(slope - error, 0.0) / BUCKET_S**2)

    def _weights(self, now: float) -> tuple[list[float], Mix]:
        """Work in each full bucket, in requests of the mean mix."""
        mix = self.mix(now)
        each_s = mix.fill_s + _decode_weight(mix)
        if each_s <= 0:
            return [b.requests for b in self._buckets], mix
        return [(b.fill_s + _decode_weight(b)) / each_s for b in self._buckets], mix

    def _first_rate(self, now: float) -> float:
        """Before the first bucket is full: over the time that passed, but at least five seconds."""
        passed_s = now - self._began_at if self._began_at is not None else 0.0
        return self._current.requests / max(passed_s, 5.0)

    def _advance(self, now: float) -> None:
        if self._began_at is None:
            self._began_at = now
        index = math.floor((now - self._began_at) / BUCKET_S)
        if index <= self._index:
            return
        self._buckets.append(self._current)
        self._buckets.extend(Mix() for _ in range(min(index - self._index - 1, BUCKETS)))
        self._current, self._index = Mix(), index


_DECODE_TOKEN_S: Final = 2e-4
"""A decoded token, against a second of prefill, where buckets are compared with each other: a step of 25 ms for 128 sequences.
What it is worth in a capacity is computed there."""


def _decode_weight(mix: Mix) -> float:
    return mix.output_tokens * _DECODE_TOKEN_S


def _line(values: list[float]) -> tuple[float, float, float]:
    """Least squares: the value at the end, the slope per place, and the standard error of the slope."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = n * (n * n - 1) / 12
    slope = sum((i - middle) * v for i, v in enumerate(values)) / spread
    left = sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values))
    return mean + slope * middle, slope, math.sqrt(left / max(n - 2, 1) / spread)
