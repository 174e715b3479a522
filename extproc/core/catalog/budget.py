"""What was spent in the last 24 hours, and what may still be."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from extproc.core.record import record

SLICE_S: Final = 3600.0
"""What is spent is added up by the hour, and forgotten by the hour: a bound for any 24 hours, held to within one of them."""
SLICES: Final = 24


class Budget:
    """So much in any 24 hours, by our own clock: there is no midnight at which all would come back at once. Begins anew with the process."""

    def __init__(self, limit: float | None) -> None:
        """`limit` None is no bound."""
        self.limit = limit
        self._slices: deque[tuple[int, float]] = deque()
        """Hour and what was spent in it, oldest first; one for each hour in which there was something."""

    def __repr__(self) -> str:
        spent = sum(amount for _, amount in self._slices)
        return f"<budget {spent:g} of {'any' if self.limit is None else f'{self.limit:g}'}>"

    def spend(self, amount: float, now: float) -> None:
        """So much more; less than nothing for what was reserved and not used."""
        hour = math.floor(now / SLICE_S)
        self._forget(hour)
        if self._slices and self._slices[-1][0] == hour:
            amount += self._slices.pop()[1]
        self._slices.append((hour, amount))

    def spent(self, now: float) -> float:
        """In the last 24 hours."""
        first = math.floor(now / SLICE_S) - SLICES
        return max(sum(amount for hour, amount in self._slices if hour > first), 0.0)

    def allows(self, amount: float, now: float) -> bool:
        """Whether so much more keeps within it."""
        return self.limit is None or self.spent(now) + amount <= self.limit

    def wait_s(self, now: float) -> float | None:
        """Seconds until something comes back; None where nothing is spent."""
        first = math.floor(now / SLICE_S) - SLICES
        oldest = next((hour for hour, amount in self._slices if hour > first and amount > 0), None)
        return None if oldest is None else (oldest + SLICES) * SLICE_S - now

    def _forget(self, hour: int) -> None:
        while self._slices and self._slices[0][0] <= hour - SLICES:
            self._slices.popleft()


@record
class Cost:
    """Of one request."""

    dollars: float
    tokens: float


@record
class Bounds:
    """What may be spent in a day; None is no bound."""

    dollars: float | None = None
    tokens: float | None = None


class Purse:
    """What one tenant, or all together, may spend on a provider."""

    def __init__(self, bounds: Bounds) -> None:
        self.dollars = Budget(bounds.dollars)
        self.tokens = Budget(bounds.tokens)

    def bound(self, bounds: Bounds) -> None:
        """Go on with other bounds."""
        self.dollars.limit, self.tokens.limit = bounds.dollars, bounds.tokens

    def lacks(self, cost: Cost, now: float) -> Budget | None:
        """The budget that this would exceed."""
        if not self.dollars.allows(cost.dollars, now):
            return self.dollars
        return None if self.tokens.allows(cost.tokens, now) else self.tokens

    def spend(self, cost: Cost, now: float) -> None:
        """So much more; less than nothing for what was reserved and not used."""
        self.dollars.spend(cost.dollars, now)
        self.tokens.spend(cost.tokens, now)
