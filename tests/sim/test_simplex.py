from __future__ import annotations

import pytest

from extproc.sim.simplex import Point, minimize


def bowl(point: Point) -> float:
    x, y = point
    return 1.0 + (x - 3) ** 2 + 10 * (y + 2) ** 2


def banana(point: Point) -> float:
    """Rosenbrock's valley: narrow and bent, least at (1, 1)."""
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


def test_the_bottom_of_a_bowl_is_found() -> None:
    value, point = minimize(bowl, (0.0, 0.0), 0.5, 200, tolerance=1e-9)
    assert value == pytest.approx(1.0, abs=1e-6)
    assert point == pytest.approx((3.0, -2.0), abs=1e-3)


def test_a_bent_valley_is_followed_to_its_end() -> None:
    assert minimize(banana, (-1.2, 1.0), 0.5, 400, tolerance=1e-12)[1] == pytest.approx((1.0, 1.0), abs=1e-3)


def test_steps_in_the_function_do_not_stop_the_search() -> None:
    value, _ = minimize(lambda p: round(bowl(p), 2), (20.0, 20.0), 1.0, 200)
    assert value == pytest.approx(1.0, abs=0.02)


def test_evaluations_are_bounded_to_those_of_one_more_move() -> None:
    seen: list[Point] = []

    def counted(point: Point) -> float:
        seen.append(point)
        return banana(point)

    minimize(counted, (-1.2, 1.0), 0.5, 50, tolerance=0.0)
    assert 50 <= len(seen) <= 54


def test_the_least_value_seen_is_returned() -> None:
    seen: list[float] = []

    def noted(point: Point) -> float:
        seen.append(banana(point))
        return seen[-1]

    value, point = minimize(noted, (-1.2, 1.0), 0.5, 60)
    assert value == min(seen) == banana(point)


def test_a_flat_function_ends_at_once() -> None:
    seen: list[Point] = []

    def flat(point: Point) -> float:
        seen.append(point)
        return 7.0

    assert minimize(flat, (0.0, 0.0), 1.0, 1000)[0] == 7.0
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("start", "seen"),
    [
        (3.0, [3.0, 4.0, 2.0, 1.0]),  # better than the best: twice as far
        (0.1, [0.1, 1.1, -0.9, -0.4]),  # better than the worst alone: half as far
        (-0.25, [-0.25, 0.75, -1.25, 0.25]),  # no better than the worst: half way back to it
        (-0.75, [-0.75, 0.25, 1.25, -0.25]),
    ],
)
def test_the_worst_corner_moves_by_the_rules(start: float, seen: list[float]) -> None:
    tried: list[float] = []

    def distance(point: Point) -> float:
        tried.append(point[0])
        return abs(point[0])

    minimize(distance, (start,), 1.0, 4)
    assert tried[:4] == pytest.approx(seen)
