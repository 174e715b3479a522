"""The rules: the field's thresholds row by row, and work over what a replica does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from extproc.core.scaling import capacity
from extproc.core.scaling.arrivals import Mix
from extproc.core.scaling.capacity import ReplicaModel
from extproc.core.scaling.rules import RULES, Need, Seen, p95, thresholds, work
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.scaling.steps import Steps

MODEL = ReplicaModel(lambda n, _: 0.010 + 1e-4 * n, 0.0, 400_000.0, 0.01)
MIX = Mix(1.0, 2000.0, 0.1, 0.12, 0.02, 200.0, 200.0 * 2000)
"""0.1 s of prefill; 200 tokens at a step of 28 ms for 180 sequences: 0.031 s. A replica does 0.9 / 0.131 = 6.9 a second."""
SETTINGS = ScalingSettings(max_replicas=5, ttft_target_s=2.0)


def seen(**fields: Any) -> Seen:
    given: dict[str, Any] = {
        "asked": 2,
        "replicas": 2,
        "model": MODEL,
        "mix": MIX,
        "per_s": 10.0,
        "later_per_s": 10.0,
        "growth_per_s2": 0.0,
        "queue": 0,
        "late_requests": 0.0,
        "in_flight": 10,
        "ttft_p95_s": None,
        "gpu": None,
    }
    return Seen(**{**given, **fields})


# --- thresholds ---------------------------------------------------------------------------------------------------------


TABLE = [  # time, queue, p95 in ms, GPU use, replicas from then on
    (0.0, 10, 1000, 0.30, 1),
    (120.0, 60, 2500, 0.70, 2),
    (240.0, 100, 4000, 0.90, 3),
    (360.0, 80, 3500, 0.85, 4),
    (600.0, 20, 1000, 0.40, 4),
    (1000.0, 5, 500, 0.20, 3),
]


def test_the_table_of_the_thresholds_rule_comes_out_row_by_row() -> None:
    settings = ScalingSettings(rule="thresholds", max_replicas=5)
    steps = Steps(settings)
    steps.begin(1, 0.0)
    rows = []
    for at, queue, p95_ms, gpu, _ in TABLE:
        assert steps.asked is not None
        look = seen(asked=steps.asked, queue=queue, ttft_p95_s=p95_ms / 1000, gpu=gpu)
        rows.append(steps.take(thresholds(look, settings), at))
    assert rows == [row[-1] for row in TABLE]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"queue": 51}, 3),
        ({"queue": 50}, 2),
        ({"ttft_p95_s": 3.01}, 3),
        ({"ttft_p95_s": 3.0}, 2),
        ({"gpu": 0.86}, 3),
        ({"gpu": 0.85}, 2),
        ({"queue": 9, "gpu": 0.29}, 1),
        ({"queue": 10, "gpu": 0.29}, 2),
        ({"queue": 9, "gpu": 0.30}, 2),
        ({"queue": 0, "gpu": None}, 2),
        ({"queue": 0, "gpu": 0.1, "ttft_p95_s": 4.0}, 3),
    ],
)
def test_each_bound_is_crossed_and_not_only_reached(given: dict[str, Any], wanted: int) -> None:
    need = thresholds(seen(**{"queue": 20, **given}), SETTINGS)
    assert (need.up_to, need.settled) == (wanted, False)


def test_a_way_down_by_thresholds_waits_300_seconds_after_the_last_alone() -> None:
    steps = Steps(ScalingSettings(rule="thresholds", max_replicas=5))
    steps.begin(4, 0.0)
    asked = {}
    for at in (299.0, 300.0, 599.0, 600.0):
        fewer = (steps.asked or 0) - 1
        asked[at] = steps.take(Need(fewer, fewer, settled=False), at)
    assert asked == {299.0: 4, 300.0: 3, 599.0: 3, 600.0: 2}


# --- work ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_s", "replicas"), [(1.0, 1), (6.0, 1), (9.0, 2), (15.0, 3), (25.0, 4), (1000.0, 5)])
def test_replicas_are_work_over_what_one_does(per_s: float, replicas: int) -> None:
    assert work(seen(per_s=per_s, later_per_s=per_s), SETTINGS).up_to == replicas


def test_growth_counts_before_it_is_there_and_decline_only_afterwards() -> None:
    assert work(seen(per_s=6.0, later_per_s=15.0), SETTINGS).up_to == 3
    assert work(seen(per_s=15.0, later_per_s=6.0), SETTINGS).up_to == 3


def test_what_waits_too_long_is_to_be_worked_off_in_a_minute() -> None:
    assert work(seen(per_s=6.0, later_per_s=6.0, late_requests=480.0), SETTINGS).up_to == 3


def test_late_first_tokens_ask_for_one_more_unless_one_is_starting() -> None:
    late = seen(per_s=6.0, later_per_s=6.0, ttft_p95_s=2.1)
    assert work(late, SETTINGS).up_to == 3
    assert work(replace(late, replicas=1), SETTINGS).up_to == 1
    assert work(replace(late, ttft_p95_s=1.9), SETTINGS).up_to == 1


def test_the_way_down_wants_a_margin() -> None:
    need = work(seen(per_s=6.0, later_per_s=6.0), SETTINGS)
    assert (need.up_to, need.down_to) == (1, 2)


def test_a_way_up_takes_along_what_growth_will_need_until_another_change_pays() -> None:
    wide = replace(SETTINGS, max_replicas=20)
    one_per_s = capacity.per_s(MODEL, MIX, 2, wide)
    growing = seen(per_s=10.0, later_per_s=10.0, growth_per_s2=one_per_s / 200.0)  # a replica more every 200 s
    need = work(growing, wide)
    # Three at once are idle for 200 + 400 s, or 600 s of growth squared over twice 200 s: 900 replica-seconds, the price of a change.
    assert (need.up_to, need.at_once) == (2, 2 + 3)
    assert work(growing, replace(wide, change_cost_s=0.0)).at_once == 2
    assert work(growing, replace(wide, change_cost_s=100.0)).at_once == 2 + 1
    assert work(seen(per_s=10.0, later_per_s=10.0), wide).at_once == 2


def test_growth_without_work_asks_for_nothing_more() -> None:
    idle = seen(mix=Mix(1.0), growth_per_s2=1.0)
    assert work(idle, SETTINGS).at_once == 1


def test_nothing_is_needed_where_nothing_came_but_for_what_still_runs() -> None:
    assert work(seen(mix=Mix(), in_flight=0), SETTINGS) == Need(0, 0)
    assert work(seen(mix=Mix(), in_flight=1), SETTINGS) == Need(1, 1)
    assert work(seen(mix=Mix(), in_flight=0, queue=3), SETTINGS) == Need(1, 1)


def test_rules_have_names() -> None:
    assert dict(RULES) == {"work": work, "thresholds": thresholds}


def test_a_percentile_of_few_is_unknown() -> None:
    assert p95([1.0] * 19) is None
    assert p95([float(i) for i in range(1, 101)]) == 95.0
