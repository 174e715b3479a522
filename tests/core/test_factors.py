from __future__ import annotations

import math

import pytest

from extproc.core.factors import SURPRISE, Part, Parts


def seen(parts: Parts, kind: str, times: float, n: int) -> float:
    """A new replica of that kind shows `times` what is expected, n times over. Returns its factor then."""
    factor = parts.factor(kind)
    for _ in range(n):
        factor.learn(math.log(times / factor.value), factor.variance + 0.01)
    return factor.value


def test_nothing_seen_is_one() -> None:
    assert Parts().factor("a").value == 1.0


def test_a_factor_is_found() -> None:
    assert seen(Parts(), "a", 3.0, 20) == pytest.approx(3.0, rel=0.05)


def test_most_of_what_the_first_one_shows_is_believed_of_all() -> None:
    parts = Parts()
    seen(parts, "a", 2.0, 20)
    alike, unlike = parts.factor("a"), parts.factor("b")
    assert 1.0 < unlike.value < alike.value <= 2.0
    assert alike.value == pytest.approx(2.0, rel=0.05)


def test_kinds_are_told_apart() -> None:
    parts = Parts()
    one, other = parts.factor("a"), parts.factor("b")
    for _ in range(100):
        for factor, truth in ((one, 1.0), (other, 4.0)):
            factor.learn(math.log(truth / factor.value), factor.variance + 0.01)
    assert one.value == pytest.approx(1.0, rel=0.1)
    assert other.value == pytest.approx(4.0, rel=0.1)


def test_time_takes_back_only_what_sets_one_apart() -> None:
    parts = Parts()
    usual, odd = parts.factor("a"), parts.factor("a")
    for _ in range(100):
        usual.learn(math.log(1.0 / usual.value), usual.variance + 0.01)
        odd.learn(math.log(2.0 / odd.value), odd.variance + 0.01)
    apart = odd.value / usual.value
    assert apart == pytest.approx(2.0, rel=0.1)
    odd.fade(20.0)
    assert 1.0 < odd.value / usual.value < apart
    for factor in (odd, usual):
        factor.fade(math.inf)
    assert odd.value == usual.value != 1.0


def test_an_observation_of_little_weight_moves_little() -> None:
    light, heavy = Parts().factor("a"), Parts().factor("a")
    light.learn(1.0, light.variance + 0.01, slope=0.1)
    heavy.learn(1.0, heavy.variance + 0.01)
    assert 1.0 < light.value < heavy.value


def test_a_lasting_surprise_raises_doubt_and_is_learned_fast() -> None:
    part = Part(0.05, 0.0)
    sure = part.variance
    for _ in range(30):
        if part.doubt(3.0) > 1.5:
            part.forget()
            break
    assert part.variance > 10 * sure


def test_a_single_surprise_raises_none() -> None:
    part = Part(0.05, 0.0)
    assert part.doubt(100.0) < 1.0


def test_a_factor_stays_within_bounds() -> None:
    factor = Parts().factor("a")
    for _ in range(1000):
        factor.learn(SURPRISE, factor.variance + 0.01)
    assert factor.value < math.inf
    assert factor.variance > 0.0


def test_repr_is_a_status_line() -> None:
    assert repr(Part(0.5, 0.01)) == "<part x1.00 +-50%>"
    assert repr(Parts().factor("a")).startswith("<factor x1.00: pool <part")
