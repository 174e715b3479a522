"""A factor between what was expected and what is seen, learned for a whole pool at once.

Equal replicas are equally fast, and what makes one prior wrong mostly makes all of them wrong. So a factor is a product
of three: that of the pool, of the kind of replica (equal labels), and of the replica itself. Each starts as sure as it deserves,
and an observation moves the least sure most (a Kalman filter on the logarithms, one variance each). Learned for each replica
alone, the noise of a few dozen observations made equal replicas look 1.7 times as fast as each other, which cost 2 to 10 % of
mean TTFT, and a replica that was not chosen never learned anything.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final

from extproc.core.tokens import Bounded

SURPRISE: Final = math.log(8.0)
"""An observation further off than this, as a logarithm, is clipped to it: one stalled request must not set a factor."""
_LIMIT: Final = math.log(50.0)
"""Of the logarithm of each part."""
_DOUBT: Final = 2.2
"""So far off on average, in standard deviations, over the last ten or so observations: then the factor has changed."""
_DOUBTFUL: Final = 0.3
"""How unsure a part is then, as a standard deviation."""
_KINDS: Final = 256
"""Kinds of replicas that are remembered: labels come from discovery, so their number has no bound of its own."""
_FADE_S: Final = 200.0
"""What sets one replica apart is forgotten over about so many seconds, unless it shows again."""


class Part:
    """A part of a factor: its logarithm, and how unsure we are of it."""

    __slots__ = ("_drift", "_off", "log", "variance")

    def __init__(self, deviation: float, drift: float) -> None:
        """`deviation`: of the logarithm at first. `drift`: by how much it may wander from one observation to the next."""
        self.log = 0.0
        self.variance = deviation**2
        self._drift = drift**2
        self._off = 0.0
        """Moving average of how far off observations were, in standard deviations."""

    def __repr__(self) -> str:
        return f"<part x{math.exp(self.log):.2f} +-{math.sqrt(self.variance):.0%}>"

    def move(self, slope: float, error: float, variance: float) -> None:
        """An observation was `error` off, with `variance` expected; it changes by `slope` per unit of the logarithm."""
        gain = slope * self.variance / variance
        self.log = max(min(self.log + gain * error, _LIMIT), -_LIMIT)
        self.variance = min(self.variance * (1.0 - gain * slope) + self._drift, 1.0)

    def doubt(self, deviations: float) -> float:
        """Keep count of how far off the observations are. Returns the moving average."""
        self._off += 0.1 * (max(min(deviations, 4.0), -4.0) - self._off)
        return self._off

    def forget(self) -> None:
        """What was learned may no longer hold."""
        self.variance = max(self.variance, _DOUBTFUL**2)
        self._off = 0.0


class Parts:
    """The parts of one measure that the replicas of a pool share."""

    __slots__ = ("_kinds", "_pool")

    def __init__(self) -> None:
        self._pool = Part(0.5, 0.01)
        self._kinds: Bounded[Hashable, Part] = Bounded(_KINDS)

    def factor(self, kind: Hashable) -> Factor:
        """That of a new replica of this kind."""
        return Factor(self._pool, self._kinds.learned(kind, lambda: Part(0.3, 0.005)))


class Factor:
    """What one replica's observations are to what was expected."""

    __slots__ = ("_kind", "_own", "_pool")

    def __init__(self, pool: Part, kind: Part) -> None:
        self._pool, self._kind = pool, kind
        self._own = Part(0.1, 0.012)

    def __repr__(self) -> str:
        return f"<factor x{self.value:.2f}: pool {self._pool!r}, kind {self._kind!r}, own {self._own!r}>"

    @property
    def value(self) -> float:
        return math.exp(self._pool.log + self._kind.log + self._own.log)

    @property
    def variance(self) -> float:
        """Of its logarithm."""
        return self._pool.variance + self._kind.variance + self._own.variance

    def learn(self, error: float, variance: float, slope: float = 1.0) -> None:
        """An observation was `error` off, as a logarithm, with `variance` expected, that of the factor included.

        `slope`: the share of the observation that the factor multiplies.
        """
        for part in (self._pool, self._kind, self._own):
            part.move(slope, error, variance)
        deviations = error / math.sqrt(variance)
        common, own = abs(self._pool.doubt(deviations)), abs(self._own.doubt(deviations))
        if common > _DOUBT:
            self._pool.forget()
        elif own > _DOUBT and own > 2.0 * common:
            self._own.forget()

    def fade(self, elapsed_s: float) -> None:
        """Time passed: what sets this replica apart is believed a little less, so that one avoided for it is tried again."""
        self._own.log *= 1.0 - min(elapsed_s / _FADE_S, 1.0)
