from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.account import Rate
from extproc.core.admission.gcra import Meter

FREE = Rate(10, 10)


def asked(meter: Meter, rate: Rate, now: float, cost: float = 1.0) -> bool:
    """Take it if it conforms; whether it did."""
    if meter.wait_s(cost, rate, now) > 0:
        return False
    meter.take(cost, rate, now)
    return True


def test_ten_at_once_pass_and_the_eleventh_is_told_six_seconds() -> None:
    meter = Meter()
    assert [asked(meter, FREE, 100.0) for _ in range(11)] == [True] * 10 + [False]
    assert meter.wait_s(1.0, FREE, 100.0) == pytest.approx(6.0)


def test_one_comes_back_every_six_seconds_and_all_of_them_after_a_minute() -> None:
    meter = Meter()
    for _ in range(10):
        asked(meter, FREE, 0.0)
    assert [asked(meter, FREE, t) for t in (5.99, 6.0, 6.0, 12.0)] == [False, True, False, True]
    assert [asked(meter, FREE, 72.0) for _ in range(11)] == [True] * 10 + [False]


def test_a_refusal_costs_nothing() -> None:
    meter = Meter()
    for _ in range(10):
        asked(meter, FREE, 0.0)
    waits = [meter.wait_s(1.0, FREE, t / 10) for t in range(50)]
    assert waits == pytest.approx([6.0 - t / 10 for t in range(50)])


def test_a_burst_of_one_spaces_evenly_so_that_no_minute_has_more_than_the_limit() -> None:
    meter, rate = Meter(), Rate(10, 1)
    passed = [t for t in (i / 10 for i in range(2000)) if asked(meter, rate, t)]
    assert max(sum(start <= t < start + 60 for t in passed) for start in passed) == 10


def test_what_is_given_back_can_be_taken_again_but_not_twice() -> None:
    meter = Meter()
    for _ in range(10):
        meter.take(1.0, FREE, 0.0)
    meter.give_back(1.0, FREE)
    assert asked(meter, FREE, 0.0)
    assert not asked(meter, FREE, 0.0)
    meter.give_back(10.0, FREE)  # a minute later they are back by themselves
    assert [asked(meter, FREE, 60.0) for _ in range(11)] == [True] * 10 + [False]


def test_more_than_a_burst_waits_for_a_full_meter_and_no_longer() -> None:
    meter, rate = Meter(), Rate(600, 600)
    meter.take(100.0, rate, 0.0)
    assert meter.wait_s(5000.0, rate, 0.0) == pytest.approx(10.0)


def test_what_is_left_is_told() -> None:
    meter = Meter()
    assert meter.quota(FREE, 0.0).remaining == 10
    for _ in range(3):
        meter.take(1.0, FREE, 0.0)
    quota = meter.quota(FREE, 1.0)
    assert (quota.limit, quota.remaining) == (10, 7)
    assert quota.reset_s == pytest.approx(17.0)


@given(
    per_minute=st.integers(1, 1000),
    share=st.floats(0.01, 1),
    gaps=st.lists(st.sampled_from([0.0, 0.001, 0.5, 7.0, 60.0]), min_size=1, max_size=200),
    start=st.floats(0, 1e7),
)
def test_no_window_has_more_than_its_burst_and_its_rate(
    per_minute: int, share: float, gaps: list[float], start: float
) -> None:
    rate = Rate(per_minute, max(1, int(per_minute * share)))
    meter, now, passed = Meter(), start, []
    for gap in gaps:
        now += gap
        if asked(meter, rate, now):
            passed.append(now)
    for i, first in enumerate(passed):
        for j, last in enumerate(passed[i:], 1):
            assert j <= rate.burst + (last - first) / rate.interval_s + 1e-3


@given(per_minute=st.integers(1, 100_000), start=st.floats(0, 1e7))
def test_a_whole_burst_passes_whatever_the_interval(per_minute: int, start: float) -> None:
    """Sums of 60/7 s are not exact."""
    rate, meter = Rate(per_minute, min(per_minute, 50)), Meter()
    assert all(asked(meter, rate, start) for _ in range(int(rate.burst)))
    assert not asked(meter, rate, start)
