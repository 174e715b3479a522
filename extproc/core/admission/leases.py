"""A share of a limit that several routers keep together, held here so that a request need not ask.

One store holds the meter (`gcra.py`) that counts for all. A router takes a lease from it: some units, charged there at once and good for
`ttl_s` seconds here. Requests spend the lease; what is left of it when it ends goes back. A router that has no lease, and was not told that
nothing is left, may run into debt by a small `credit`; the debt is charged with the next lease, whatever is left then. So with R routers,
in any w seconds, at most

    burst + rate * (w + ttl_s) + R * credit

units pass: what was charged may be spent up to `ttl_s` later, and debts come on top. As a share of a limit of N a minute that is
`ttl_s / 60 + R * credit / N`. With 1 s, and `credit = max(1, 0.03 * N / R)`, it is 4.7 % for N of 34 R or more, and one request for each router
below that. Requests whose cost is not one (tokens) may each exceed the credit by their own cost. Debts are never forgiven, so the long run is exact.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from extproc.core.account import PERIOD_S, Rate
from extproc.core.record import record

Key = tuple[str, str, str]
"""Tenant, kind (`requests` or `tokens`), model or empty."""

CREDIT: Final = 0.03
"""Of the limit, for all routers together; with TTL_S it keeps the excess below 5 %."""
TTL_S: Final = 1.0
"""Seconds for which leased units may be spent."""
SPARE: Final = 2.0
"""Asked for is what was spent since the last ask, times this, but half a burst at least. The store gives no more than a router's share of
what is there, and what is asked for too much is back after `TTL_S`."""
AGAIN_S: Final = 0.05
"""When to come again where only the answer of the store is missing, seconds."""


@record
class Ask:
    """What to say to the store about one meter."""

    key: Key
    rate: Rate
    charge: float
    """Units to take whatever is left, for debts; negative gives back."""
    want: float
    """Units to lease on top, as far as they are there."""
    routers: int
    """Among whom what is there is to be shared."""


@record
class Told:
    """What the store answered."""

    key: Key
    granted: float
    full_in_s: float
    """Until the meter is whole again, if nothing more comes."""


class Lease:
    """One router's part of one meter."""

    __slots__ = (
        "again_at",
        "ahead",
        "asked_at",
        "back",
        "charged",
        "key",
        "left",
        "open_at",
        "rate",
        "spent",
        "thirsty",
        "until",
        "wanted",
        "whole_at",
    )

    def __init__(self, key: Key, rate: Rate, ahead: bool = True) -> None:
        """`ahead`: units are leased before they are needed. What lies here is missing elsewhere, until it has ended."""
        self.key = key
        self.rate = rate
        self.ahead = ahead
        self.left = 0.0
        """Units that may be spent; below 0 are debts."""
        self.until = 0.0
        """When what is left has to go back."""
        self.back = 0.0
        """Units that have to."""
        self.open_at = float("-inf")
        """Before that nothing is to be had, by the last word of the store."""
        self.again_at = float("-inf")
        """When to ask all the same, for others may have given back what they did not need."""
        self.thirsty = False
        """A request was refused since then."""
        self.whole_at = float("-inf")
        """When the store's meter is full, by its last word."""
        self.spent = 0.0
        """Since the last ask; counted only where it is to tell what will be needed."""
        self.wanted = 0
        """Requests that wait for a unit each."""
        self.asked_at: float | None = None
        """An ask is under way."""
        self.charged = 0.0
        """With it: the debts that it settles."""

    def __repr__(self) -> str:
        return f"<lease {self.left:g} of {self.rate.per_minute:g}/min until {self.until:.3f}>"

    def wait_s(self, credit: float, now: float) -> float:
        """Seconds until a request may come; 0 for now."""
        self._lapse(now)
        if self.left > 0:
            return 0.0
        if now < self.open_at:
            return self.open_at - now
        return 0.0 if self.charged - self.left < credit else AGAIN_S

    def refused(self, now: float) -> bool:
        """A request was refused. Whether to ask again because of it: it is for want of units, and the last word is old."""
        self._lapse(now)
        self.thirsty = self.thirsty or (self.left <= 0 and self.again_at <= now < self.open_at)
        return self.thirsty

    def spend(self, cost: float) -> None:
        """Take it from what is left, or into debt."""
        self.left -= cost
        if self.ahead:
            self.spent += cost

    def regain(self, cost: float) -> None:
        """Of what was spent so much was not needed: it goes back, for here it might be spent too late."""
        self.back += cost

    def due(self, now: float) -> bool:
        """Whether the store should be asked: for more, to settle debts, or to give back."""
        self._lapse(now)
        if self.asked_at is not None:
            return False
        if self.left < 0 or self.back > 0 or self.thirsty or self.wanted > self.left:
            return True
        return self.spent > 0 and now >= self.open_at and self.left <= self.spent / SPARE

    def ask(self, routers: int, now: float) -> Ask:
        """What to say; afterwards `told` or `unheard` has to be called."""
        self._lapse(now)
        self.charged, self.left = max(-self.left, 0.0), max(self.left, 0.0)
        want = float(self.wanted)
        if self.ahead and (self.spent > 0 or self.thirsty):
            want = max(want, self.spent * SPARE, self.rate.burst / 2)
        ask = Ask(self.key, self.rate, self.charged - self.back, max(ceil(want - self.left), 0), routers)
        self.spent = self.back = 0.0
        self.wanted = 0
        self.thirsty = False
        self.asked_at = now
        return ask

    def told(self, told: Told, now: float, ttl_s: float) -> None:
        """The store answered. A lease is good from the moment of its ask, and one that adds to what is left ends with that: so
        nothing is spent later than `ttl_s` after it was charged.
        """
        assert self.asked_at is not None, self
        self._lapse(now)
        if self.left <= 0:
            self.until = self.asked_at + ttl_s
        self.left += told.granted
        self.asked_at, self.charged = None, 0.0
        self.whole_at = now + told.full_in_s
        missing_s = told.full_in_s - (self.rate.burst - 1) * self.rate.interval_s
        self.open_at = now + missing_s if missing_s > 0 else float("-inf")
        self.again_at = now + ttl_s / 2

    def unheard(self) -> None:
        """No answer. Whether the store charged nobody knows: debts are kept, and what was to go back is not."""
        self.left -= self.charged
        self.asked_at, self.charged = None, 0.0

    def _lapse(self, now: float) -> None:
        if self.left > 0 and now >= self.until:
            self.back, self.left = self.back + self.left, 0.0

    def lacks(self, now: float) -> bool:
        """Whether a request would have to run into debt, though something may be there."""
        self._lapse(now)
        return self.left <= 0 and now >= self.open_at

    @property
    def rests(self) -> bool:
        """Whether nothing is left, owed or under way."""
        return self.left == self.back == 0 and self.asked_at is None

    @property
    def quiet(self) -> bool:
        """Whether time alone will give it nothing to ask."""
        return self.rests and self.spent == self.wanted == 0 and not self.thirsty


def credit(rate: Rate, routers: int) -> float:
    """Units that one router may owe."""
    return max(1.0, CREDIT * rate.per_minute / routers)


def overshoot(rate: Rate, routers: int, ttl_s: float = TTL_S) -> float:
    """Most units above the limit of a minute, as a share of it; see the head of this file."""
    return ttl_s / PERIOD_S + routers * credit(rate, routers) / rate.per_minute
