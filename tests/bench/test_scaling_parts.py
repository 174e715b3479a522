"""The parts of the scaling benchmark: the rivals follow the documents, and the comparison is fair."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from extproc.core.router import Router
from extproc.core.settings import PoolSettings
from extproc.sim.elastic import Sight
from tests.bench.scaling import (
    DAY_S,
    LOW_PER_S,
    MAX_REPLICAS,
    PEAK_PER_S,
    SHAPES,
    WORK,
    Case,
    Hpa,
    Row,
    best,
    by_gpu,
    by_queue,
    day,
    jobs,
    rate_per_s,
    summary,
)

ROUTER = Router([PoolSettings("p")], Random(1))


def sight(now: float, asked: int, **fields: Any) -> Sight:
    given: dict[str, Any] = {"ready": asked, "queue": 0, "gpu": None, **fields}
    return Sight(now=now, asked=asked, router=ROUTER, **given)


# --- the HPA ------------------------------------------------------------------------------------------------------------


def test_the_hpa_adds_two_pods_a_minute_after_thirty_seconds() -> None:
    hpa, pods, seen = Hpa(1), 1, []
    hpa.take(1, 1, -15.0)
    for at in range(0, 150, 15):
        pods = hpa.take(8, pods, float(at))
        seen.append(pods)
    assert seen == [1, 3, 3, 3, 3, 5, 5, 5, 5, 7]


def test_the_hpa_takes_one_pod_a_minute_after_five_minutes() -> None:
    hpa, pods, seen = Hpa(1), 5, {}
    hpa.take(5, 5, 0.0)
    for at in range(15, 500, 15):
        pods = hpa.take(2, pods, float(at))
        seen[at] = pods
    assert seen[285] == 5
    assert seen[300] == 4
    assert seen[345] == 4
    assert seen[360] == 3
    assert seen[420] == 2
    assert seen[495] == 2


def test_the_hpa_keeps_to_its_bounds() -> None:
    assert Hpa(3).take(0, 3, 0.0) == 3
    hpa = Hpa(1)
    assert hpa.take(99, MAX_REPLICAS, 0.0) == MAX_REPLICAS


# --- rivals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queue", "pods"), [(0, 1), (9, 1), (22, 3), (19, 2), (35, 3), (200, 3)])
def test_the_queue_rule_divides_what_waits_by_its_threshold(queue: int, pods: int) -> None:
    # From one pod: at most two more, and 19 of 20 is within the tolerance of two.
    assert by_queue(10.0, 1)(sight(0.0, 1, queue=queue)) == pods


def test_the_gpu_rule_asks_for_the_target_on_average() -> None:
    assert by_gpu(0.75, 1)(sight(0.0, 2, gpu=1.0)) == 3
    assert by_gpu(0.75, 1)(sight(0.0, 4, gpu=0.8)) == 4  # within the tolerance
    assert by_gpu(0.75, 1)(sight(0.0, 3, gpu=1.0, ready=2)) == 3  # the third starts, and counts as idle
    assert by_gpu(0.75, 1)(sight(0.0, 4, gpu=0.3)) == 2 + 1  # two would do; one pod a minute


# --- the day and the verdict --------------------------------------------------------------------------------------------


def test_a_day_is_made_from_its_seed_and_has_its_shape() -> None:
    trace = day(1)
    assert trace is day(1)
    starts = [turn.delay_s for turn in trace.turns]
    assert starts == sorted(starts)
    assert starts[-1] < DAY_S
    night = sum(t < 0.2 * DAY_S for t in starts) / (0.2 * DAY_S)
    peak = sum(0.42 * DAY_S < t < 0.48 * DAY_S for t in starts) / (0.06 * DAY_S)
    assert night == pytest.approx(LOW_PER_S, rel=0.15)
    assert peak == pytest.approx(PEAK_PER_S, rel=0.15)
    assert max(rate_per_s(i / 1000) for i in range(1000)) <= PEAK_PER_S


def row(case: Case, attainment: float, hours: float, events: int = 10) -> Row:
    return Row(case, 1, 1000, attainment, 1.0, 0.05, hours, events, 8)


ROWS = [
    row(WORK, 0.98, 9.0, 17),
    row(Case("queue", 10.0), 0.75, 8.0, 60),
    row(Case("queue", 1.0, 7), 0.979, 12.0, 20),
    row(Case("queue", 1.0, 8), 0.999, 14.0),
    row(Case("gpu", 0.75), 0.997, 22.0, 8),
    row(Case("fixed", least=7), 0.99, 11.0, 0),
]


def test_a_rival_is_its_cheapest_setting_that_serves_as_many_in_time() -> None:
    found = best(ROWS, "queue", 0.98)
    assert found is not None
    assert (found.case.least, found.replica_hours) == (7, 12.0)
    assert best(ROWS, "queue", 1.0) is not None  # 0.999 is equal
    assert best(ROWS[:2], "queue", 0.98) is None


def test_the_ratio_is_to_the_better_of_the_rivals_that_scale() -> None:
    found = summary(ROWS)
    assert found["replica_hours_ratio"] == pytest.approx(9.0 / 12.0)
    assert found["slo_attainment"] == 0.98
    assert found["seeds"][0]["rival"] == "queue"
    assert found["seeds"][0]["events_ratio"] == pytest.approx(17 / 20)


def test_without_a_rival_that_serves_as_many_there_is_no_ratio() -> None:
    assert summary(ROWS[:2])["replica_hours_ratio"] is None


def test_a_day_is_run_by_all_before_the_next() -> None:
    assert list(jobs((1, 2), (WORK,))) == [(WORK, 1), (WORK, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_between_night_and_peak(shape: str) -> None:
    rates = [rate_per_s(i / 1000, shape) for i in range(1001)]
    assert min(rates) >= LOW_PER_S
    assert 0.4 * PEAK_PER_S < max(rates) <= PEAK_PER_S


def test_an_office_works_by_day() -> None:
    assert [round(rate_per_s(share, "office")) for share in (0.1, 0.4, 0.6, 0.9)] == [3, 20, 20, 3]
    assert rate_per_s(0.5, "office") == pytest.approx(LOW_PER_S + 0.65 * (PEAK_PER_S - LOW_PER_S), rel=0.01)
