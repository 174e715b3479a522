"""The day as it usually goes: requests a second by time of day, learned over days, to be ahead of a peak that comes every day.

No calendar and no wall clock: what matters is what came a day ago, at the same phase of 24 hours. A library for forecasts would
bring 100 MB of numerical code for one mean per ten minutes.
"""

from __future__ import annotations

import math
from typing import Final

DAY_S: Final = 86_400.0
BINS: Final = 144
"""Of ten minutes."""
GAIN: Final = 0.3
"""Of a new day in the mean: about the last three count, so that a week's change of habits shows within the week."""
LEVEL: Final = (0.5, 1.5)
"""Today may be so much less or more than usual; a holiday halves the profile, an outage does not bring it to nothing."""


class Profile:
    """One pool's. Bounded: one number for each ten minutes of a day."""

    __slots__ = ("_day_s", "_level", "_now", "_rates", "_seconds", "_sum")

    def __init__(self, day_s: float = DAY_S) -> None:
        self._day_s = day_s
        self._rates: list[float | None] = [None] * BINS
        self._now: int | None = None
        """The bin under way, counted since time 0."""
        self._sum = self._seconds = 0.0
        self._level = 1.0

    def __repr__(self) -> str:
        return f"<profile of {sum(rate is not None for rate in self._rates)} of {BINS} bins, today {self._level:.2f}>"

    def note(self, per_s: float, now: float) -> None:
        """So many requests a second come. To be told every so often, at even intervals."""
        place = self._place(now)
        if self._now is not None and place != self._now:
            self._close(self._now)
        self._now = place
        self._sum += per_s
        self._seconds += 1.0

    def ahead(self, lead_s: float, now: float) -> float | None:
        """The most that is usual from now until `lead_s` from now, at today's level; None where no such time has been seen."""
        places = range(self._place(now), self._place(now + lead_s) + 1)
        usual = [rate for place in places if (rate := self._rates[place % BINS]) is not None]
        return max(usual) * self._level if usual else None

    def _place(self, now: float) -> int:
        return math.floor(now / self._day_s * BINS)

    def _close(self, place: int) -> None:
        """Ten minutes are over: they count for tomorrow, and tell how today compares."""
        rate, usual = self._sum / self._seconds, self._rates[place % BINS]
        self._sum = self._seconds = 0.0
        if usual is None:
            self._rates[place % BINS] = rate
            return
        if usual > 0:
            self._level += GAIN * (min(max(rate / usual, LEVEL[0]), LEVEL[1]) - self._level)
        self._rates[place % BINS] = usual + GAIN * (rate - usual)
