"""The generic cell rate algorithm (ITU-T I.371, annex A, as a virtual schedule): a rate and a burst in one number.

`tat`, the theoretical arrival time, is when a sender that had kept exactly to the rate would have sent what was taken so far. Each unit
moves it on by the interval in which one unit comes back, `60 / per_minute` seconds. A cost conforms while `tat` after it is no more
than `burst` intervals ahead of now; what does not conform moves nothing.

For a limit of N per minute with a burst of N this comes to:

* N at once pass, the next is refused, and told to come again in 60/N seconds;
* after a pause of t seconds t * N / 60 more pass, and after a minute all N are there again;
* in any w seconds no more than burst + N * w / 60 pass. With a burst of N that is up to 2 N - 1 in the worst minute (all at once, then
  each as soon as it may); with a burst of 1 it is N in any minute, evenly spaced. There is no edge of a window at which twice as
  many get through within a moment, as with counters that start anew each minute.
"""

from __future__ import annotations

from math import floor

from extproc.core.account import Quota, Rate

ROUNDING_S = 1e-6
"""Sums of intervals like 60/7 s are off by rounding; the last unit of a burst shall not be refused for that."""


class Meter:
    """What one tenant has taken of one rate. Units are requests or tokens."""

    __slots__ = ("_tat",)

    def __init__(self) -> None:
        self._tat = float("-inf")

    def __repr__(self) -> str:
        return f"<meter full at {self._tat:.3f}>"

    def wait_s(self, cost: float, rate: Rate, now: float) -> float:
        """Seconds until `cost` conforms, 0 where it does now. A cost above the burst counts as the burst, else it never would."""
        after = max(self._tat, now) + min(cost, rate.burst) * rate.interval_s
        wait_s = after - now - rate.burst * rate.interval_s
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, cost: float, rate: Rate, now: float) -> None:
        """Take it, whether or not it conforms."""
        self._tat = max(self._tat, now) + cost * rate.interval_s

    def give_back(self, cost: float, rate: Rate) -> None:
        """As if so much had not been taken. What has come back by itself meanwhile does not count twice."""
        self._tat -= cost * rate.interval_s

    def quota(self, rate: Rate, now: float) -> Quota:
        """What is left."""
        return quota(rate, max(self._tat - now, 0.0))


def quota(rate: Rate, full_in_s: float) -> Quota:
    """What is left of a rate that is whole again in so many seconds."""
    left = rate.burst - full_in_s / rate.interval_s
    return Quota(int(rate.per_minute), max(floor(left + ROUNDING_S), 0), full_in_s)
