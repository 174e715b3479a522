"""The day as it usually goes."""

from __future__ import annotations

import math

import pytest

from extproc.core.scaling.profile import BINS, DAY_S, Profile

MINUTE = 60.0


def rate(now: float) -> float:
    """A day between 1 and 21, with its peak at noon."""
    return 1.0 + 20.0 * max(math.sin((now / DAY_S - 0.25) * 2 * math.pi), 0.0)


def learned(days: float, times: float = 1.0, made: Profile | None = None, begin_day: float = 0.0) -> Profile:
    made = made or Profile()
    for minute in range(round(begin_day * 1440), round((begin_day + days) * 1440)):
        made.note(times * rate(minute * MINUTE), minute * MINUTE)
    return made


def test_nothing_is_known_of_a_day_that_was_not_seen() -> None:
    made = learned(0.5)
    assert made.ahead(600.0, 0.6 * DAY_S) is None
    assert repr(made) == f"<profile of 71 of {BINS} bins, today 1.00>"


def test_a_peak_is_known_ten_minutes_before_it_comes() -> None:
    made, morning = learned(2.3), 2.3 * DAY_S
    ahead = made.ahead(600.0, morning)
    assert ahead is not None
    assert ahead == pytest.approx(rate(morning + 900.0), rel=0.05)
    assert ahead > 1.05 * rate(morning)


def test_just_before_the_evening_the_present_still_counts() -> None:
    made, afternoon = learned(2.65), 2.65 * DAY_S
    ahead = made.ahead(600.0, afternoon)
    assert ahead is not None
    assert ahead >= 0.95 * rate(afternoon)


def test_a_quiet_day_is_taken_for_one() -> None:
    made = learned(2.0)
    learned(0.35, 0.6, made, 2.0)
    ahead = made.ahead(600.0, 2.35 * DAY_S)
    assert ahead is not None
    assert ahead == pytest.approx(0.6 * rate(2.35 * DAY_S + 900.0), rel=0.1)


def test_an_outage_does_not_make_the_profile_nothing() -> None:
    made = learned(2.0)
    learned(0.4, 0.0, made, 2.0)
    ahead = made.ahead(600.0, 2.4 * DAY_S)
    assert ahead is not None
    assert ahead >= 0.49 * rate(2.4 * DAY_S)
