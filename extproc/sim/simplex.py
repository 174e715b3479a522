"""The downhill simplex (Nelder and Mead, A simplex method for function minimization, 1965): a minimum without derivatives.

Good enough for half a dozen parameters and a function with steps in it, and nothing has to be installed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

Point: TypeAlias = tuple[float, ...]


def minimize(
    function: Callable[[Point], float], start: Sequence[float], spread: float, evaluations: int, tolerance: float = 1e-5
) -> tuple[float, Point]:
    """The least value found and where, after about so many evaluations.

    The first simplex has one corner at `start` and the others `spread` away along each axis. Ends early when the values
    at all corners lie within `tolerance`.
    """
    search = _Search(function, tuple(start), spread)
    while search.evaluations < evaluations and search.corners[-1][0] - search.corners[0][0] > tolerance:
        search.move()
    return search.corners[0]


class _Search:
    def __init__(self, function: Callable[[Point], float], start: Point, spread: float) -> None:
        self.function = function
        self.evaluations = 0
        self.corners = [self._at(start)]
        for axis in range(len(start)):
            self.corners.append(self._at(tuple(x + spread * (i == axis) for i, x in enumerate(start))))
        self.corners.sort()

    def move(self) -> None:
        """Reflect the worst corner through the others; further if that is the best yet, less far if it is still the worst."""
        *others, worst = self.corners
        reflected = self._beyond(1.0)
        if reflected < others[0]:
            self.corners = sorted([*others, min(reflected, self._beyond(2.0))])
        elif reflected < others[-1]:
            self.corners = sorted([*others, reflected])
        else:
            nearer = self._beyond(0.5 if reflected < worst else -0.5)
            if nearer < min(reflected, worst):
                self.corners = sorted([*others, nearer])
            else:
                self._shrink()

    def _beyond(self, factor: float) -> tuple[float, Point]:
        """On the line from the worst corner through the middle of the others, that much further than the middle."""
        *others, (_, worst) = self.corners
        middle = [sum(xs) / len(others) for xs in zip(*(point for _, point in others), strict=True)]
        return self._at(tuple(m + factor * (m - w) for m, w in zip(middle, worst, strict=True)))

    def _shrink(self) -> None:
        """All corners half way to the best."""
        best = self.corners[0]
        moved = [tuple((b + x) / 2 for b, x in zip(best[1], point, strict=True)) for _, point in self.corners[1:]]
        self.corners = sorted([best, *map(self._at, moved)])

    def _at(self, point: Point) -> tuple[float, Point]:
        self.evaluations += 1
        return self.function(point), point
