"""The rate at which work comes, and where it goes."""

from __future__ import annotations

from random import Random

import pytest

from extproc.core.scaling.arrivals import BUCKETS, Arrivals, Mix, Trend

ONE = Mix(1.0, 1000.0, 0.1, 0.12, 0.0144, 100.0, 100.0 * 1000)


def steady(per_s: float, until_s: float, made: Arrivals | None = None, begin_s: float = 0.0) -> Arrivals:
    made = made or Arrivals()
    for i in range(round((until_s - begin_s) * per_s)):
        made.arrived(ONE, begin_s + i / per_s)
    return made


def test_a_steady_rate_is_found_and_does_not_grow() -> None:
    made = steady(4.0, 400.0)
    assert made.per_s(400.0) == pytest.approx(4.0, rel=0.01)
    assert made.trend(400.0).per_s_in(120.0) == pytest.approx(4.0, rel=0.01)


def test_work_counts_and_not_requests() -> None:
    made = steady(4.0, 240.0)
    before = made.per_s(240.0)
    for i in range(240):
        made.arrived(ONE.scaled(0.5), 240.0 + i / 4)
    # As many requests, of half the work each. The mix is a sum over requests: 240 of them count 0.5.
    assert made.per_s(300.0) / before == pytest.approx(0.5, rel=0.02)


def test_growth_is_foretold() -> None:
    made, at = Arrivals(), 0.0
    while at < 300.0:
        made.arrived(ONE, at)
        at += 1.0 / (2.0 + at / 30.0)
    # From 2 to 12 a second in 300 s; in another 120 s it will be 16.
    assert made.per_s(300.0) == pytest.approx(11.0, rel=0.06)
    assert made.trend(300.0).per_s_in(120.0) == pytest.approx(16.0, rel=0.1)
    assert made.trend(300.0).growth_per_s2 == pytest.approx(1.0 / 30.0, rel=0.05)


def test_chance_alone_is_hardly_taken_for_growth() -> None:
    rng, ratios, growing = Random(1), [], 0
    for _ in range(50):
        made, at = Arrivals(), 0.0
        while at < 330.0:
            made.arrived(ONE, at)
            at += rng.expovariate(5.0)
        ratios.append(made.trend(330.0).per_s_in(120.0) / 5.0)
        growing += made.trend(330.0).growth_per_s2 > 0.0
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.08)
    assert max(ratios) < 1.5
    assert growing <= 15  # one in six for a normal error; without it half of them would


def test_decline_is_not_foretold_below_the_present() -> None:
    made, at = Arrivals(), 0.0
    while at < 300.0:
        made.arrived(ONE, at)
        at += 1.0 / (12.0 - at / 30.0)
    assert made.trend(300.0).per_s_in(120.0) >= 1.7
    assert made.trend(300.0).growth_per_s2 == 0.0


def test_two_minutes_are_needed_for_a_trend() -> None:
    made, at = Arrivals(), 0.0
    while at < 119.0:
        made.arrived(ONE, at)
        at += 1.0 / (2.0 + at / 30.0)
    assert made.trend(119.0) == Trend(made.per_s(119.0), 0.0)
    assert made.trend(120.0).growth_per_s2 > 0.0


def test_silence_is_a_rate_of_zero() -> None:
    made = steady(4.0, 100.0)
    assert made.per_s(200.0) == 0.0
    assert made.mix(200.0).requests == 1.0
    assert made.mix(100.0 + 15.0 * (BUCKETS + 2)).requests == 0.0
    assert made.per_s(1e6) == 0.0


def test_the_first_seconds_count_over_at_least_five() -> None:
    made = Arrivals()
    made.arrived(ONE, 100.0)
    assert made.per_s(100.0) == pytest.approx(0.2)
    assert made.per_s(104.0) == pytest.approx(0.2)


def test_buckets_are_counted_from_the_beginning_and_none_is_lost() -> None:
    made = steady(4.0, 29.5, begin_s=14.0)
    assert made.per_s(28.9) == pytest.approx(4.0, rel=0.05)
    assert made.per_s(29.1) == pytest.approx(4.0, rel=0.05)
    assert made.mix(29.1).requests == 1.0


def test_the_mix_is_a_mean() -> None:
    made = Arrivals()
    made.arrived(ONE, 0.0)
    made.arrived(ONE.scaled(3.0), 1.0)
    assert made.mix(2.0) == ONE
