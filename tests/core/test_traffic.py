from __future__ import annotations

import math

import pytest

from extproc.core.traffic import Prices, Traffic


def busy(rate: float, prefill_s: float, ttft_s: float, decode_s: float, lasting_s: float = 200.0) -> Traffic:
    """Arrivals at even distances for so many seconds, all alike."""
    traffic = Traffic()
    for n in range(round(rate * lasting_s)):
        traffic.arrived(prefill_s, n / rate)
        traffic.answered(ttft_s, decode_s)
    return traffic


def prices(traffic: Traffic, replicas: int = 1, strangers_each: float = 0.0, now: float = 200.0) -> Prices:
    return traffic.prices(replicas, strangers_each, now)


def test_decode_is_worth_what_makes_one_per_cent_of_each_mean_worth_the_same() -> None:
    found = prices(busy(1.0, 0.1, ttft_s=0.5, decode_s=4.0))
    assert found.decode == pytest.approx(0.5 / (0.5 + 4.5), rel=0.01)


def test_later_requests_are_those_in_line_by_littles_law_where_others_are_busy_as_well() -> None:
    found = prices(busy(2.0, 0.1, ttft_s=0.3, decode_s=3.0))
    assert found.later == pytest.approx(0.2 * 2.0 * 0.3 / (1.0 - 0.2), rel=0.05)


def test_an_idle_fleet_has_nobody_to_come() -> None:
    assert prices(Traffic(), replicas=8, now=0.0).later == 0.0
    assert prices(busy(0.01, 0.1, 0.2, 3.0), replicas=8, now=20_000.0).later < 0.01


def test_more_replicas_share_the_arrivals() -> None:
    traffic = busy(8.0, 0.01, 0.05, 3.0)
    assert prices(traffic, replicas=8).later < prices(traffic, replicas=2).later / 3


def test_in_an_overload_the_number_stays_bounded() -> None:
    assert prices(busy(20.0, 1.0, 60.0, 60.0)).later == 5.0


def test_the_rate_is_right_from_the_first_seconds_and_fades() -> None:
    traffic = busy(10.0, 0.05, 0.1, 3.0, lasting_s=5.0)
    early = prices(traffic, now=5.0).later
    assert early == pytest.approx(0.5 * 10.0 * 0.1 / 0.5, rel=0.35)
    assert prices(traffic, now=35.0).later < early / 2


def test_requests_of_others_come_beside_ours() -> None:
    traffic = busy(2.0, 0.05, 0.3, 3.0)
    assert prices(traffic, strangers_each=1.0).later > 4 * prices(traffic).later


def test_a_request_of_others_stands_for_its_share_of_life_in_prefill() -> None:
    found = prices(busy(1.0, 0.2, ttft_s=0.5, decode_s=4.5))
    assert found.unseen_s == pytest.approx(0.5 / 5.0 * 0.2, rel=0.02)
    assert found.unseen_rate == pytest.approx(1.0 / 5.0, rel=0.01)


def test_long_prefills_are_met_more_often_than_they_come() -> None:
    traffic = Traffic()
    for n in range(2000):
        traffic.arrived(1.0 if n % 10 == 0 else 0.1, float(n))
        traffic.answered(0.5, 4.5)
    mean, square = 0.19, 0.109
    assert prices(traffic, now=2000.0).unseen_s == pytest.approx(0.1 * square / mean, rel=0.15)


def test_before_anything_is_seen_prices_are_finite() -> None:
    for value in vars_of(prices(Traffic(), replicas=8, now=1e9)):
        assert math.isfinite(value)


def vars_of(found: Prices) -> list[float]:
    return [found.decode, found.later, found.unseen_s, found.unseen_rate]
