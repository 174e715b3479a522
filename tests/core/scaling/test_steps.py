"""Cooldowns, step bounds and the way down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.scaling.rules import Need
from extproc.core.scaling.settings import ScalingSettings
from extproc.core.scaling.steps import Steps

FREE = ScalingSettings(min_replicas=1, max_replicas=20, max_step_up=4, max_step_down=2, change_cost_s=0.0)
"""Changes cost nothing: cooldowns and bounds alone keep them apart."""
PAID = replace(FREE, max_step_down=4, change_cost_s=900.0)


def steps(begin: int, settings: ScalingSettings = FREE) -> Steps:
    made = Steps(settings)
    made.begin(begin, -1e9)
    return made


def test_a_way_up_is_bounded_and_waits_for_its_cooldown() -> None:
    made = steps(2)
    took = [(at, made.take(Need(12, 12), at)) for at in (0.0, 15.0, 59.0, 60.0, 120.0, 180.0)]
    assert took == [(0.0, 6), (15.0, 6), (59.0, 6), (60.0, 10), (120.0, 12), (180.0, 12)]
    assert made.changes == 3


def test_a_way_down_waits_until_nothing_more_was_needed_for_a_cooldown() -> None:
    made = steps(10)
    made.take(Need(9, 10), 0.0)
    took = {at: made.take(Need(5, 5), at) for at in (15.0, 150.0, 299.0, 301.0, 450.0, 602.0)}
    assert took == {15.0: 10, 150.0: 10, 299.0: 10, 301.0: 8, 450.0: 8, 602.0: 6}


def test_a_moment_of_need_keeps_all_for_a_cooldown() -> None:
    made = steps(10)
    for at in range(0, 300, 15):
        made.take(Need(4, 4), float(at))
    made.take(Need(10, 10), 300.0)
    assert made.take(Need(4, 4), 599.0) == 10
    assert made.take(Need(4, 4), 601.0) == 8


def test_no_way_down_right_after_a_way_up() -> None:
    made = steps(2)
    for at in range(0, 1000, 15):
        made.take(Need(2, 2), float(at))
    assert made.take(Need(3, 3), 1000.0) == 3
    assert made.take(Need(2, 2), 1299.0) == 3


def test_the_margin_keeps_a_replica_that_is_hardly_needed() -> None:
    made = steps(3)
    assert [made.take(Need(2, 3), float(at)) for at in range(0, 2000, 100)] == [3] * 20


def test_the_first_replica_is_asked_for_at_once() -> None:
    made = steps(0, ScalingSettings(min_replicas=0, max_replicas=4))
    assert made.take(Need(1, 1), 0.0) == 1
    for at in range(10, 400, 10):
        made.take(Need(0, 0), float(at))
    assert made.asked == 0
    assert made.take(Need(1, 1), 401.0) == 1


def test_bounds_that_change_hold_from_the_next_look_on() -> None:
    made = steps(8)
    made.settings = ScalingSettings(min_replicas=1, max_replicas=3)
    assert made.take(Need(8, 8), 0.0) == 3


# --- what a change costs ------------------------------------------------------------------------------------------------


def looks(made: Steps, need: Need, begin: int, end: int) -> list[tuple[int, int]]:
    """One every 15 s; (time, replicas) of each change."""
    changed, before = [], made.asked
    for at in range(begin, end, 15):
        if (asked := made.take(need, float(at))) != before:
            changed.append((at, asked))
            before = asked
    return changed


def test_a_way_up_takes_along_what_is_needed_soon_within_the_bounds() -> None:
    assert steps(2).take(Need(3, 3, at_once=5), 0.0) == 5
    assert steps(2).take(Need(3, 3, at_once=9), 0.0) == 6
    assert steps(18).take(Need(19, 19, at_once=99), 0.0) == 20
    assert steps(2).take(Need(3, 3, at_once=1), 0.0) == 3


def test_what_is_needed_soon_alone_asks_for_nothing() -> None:
    assert steps(3).take(Need(3, 3, at_once=9), 0.0) == 3


def test_idle_replicas_go_when_they_have_cost_what_a_change_does() -> None:
    one, three = steps(10, PAID), steps(10, PAID)
    one.take(Need(10, 10), 0.0)
    three.take(Need(10, 10), 0.0)
    # From 315 s on, when the need at 0 s is over a cooldown ago: 900 replica-seconds of one, or of three.
    assert looks(one, Need(9, 9), 15, 2000) == [(1200, 9)]
    assert looks(three, Need(7, 7), 15, 2000) == [(600, 7)]


def test_replicas_that_are_needed_again_were_not_idle() -> None:
    made = steps(10, PAID)
    made.take(Need(10, 10), 0.0)
    assert looks(made, Need(9, 9), 15, 1185) == []
    made.take(Need(10, 10), 1185.0)
    assert looks(made, Need(9, 9), 1200, 2370) == []
    assert looks(made, Need(9, 9), 2370, 2500) == [(2385, 9)]


def test_after_a_way_down_the_next_must_be_worth_it_by_itself() -> None:
    made = steps(10, PAID)
    made.take(Need(10, 10), 0.0)
    assert looks(made, Need(5, 5), 15, 3000) == [(480, 6), (1380, 5)]


def test_an_idle_pool_that_may_be_empty_is_empty_after_a_cooldown() -> None:
    made = steps(1, replace(PAID, min_replicas=0))
    made.take(Need(1, 1), 0.0)
    assert looks(made, Need(0, 0), 15, 1000) == [(315, 0)]


def test_the_table_of_steps_that_are_not_settled_pays_nothing() -> None:
    made = steps(4, PAID)
    assert made.take(Need(3, 3, settled=False), 0.0) == 3


def test_time_under_another_rule_is_not_idle_time() -> None:
    made = steps(4, PAID)
    made.take(Need(4, 4), 0.0)
    for at in range(15, 3000, 15):
        made.take(Need(4, 4, settled=False), float(at))
    assert looks(made, Need(3, 3), 3000, 4000) == [(3885, 3)]


def test_who_begins_again_takes_nothing_away_yet() -> None:
    made = steps(10, PAID)
    looks(made, Need(5, 5), 0, 300)
    made.begin(10, 5000.0)
    assert looks(made, Need(5, 5), 5015, 7000)[0] == (5300, 6)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.floats(1.0, 400.0)), max_size=60), st.integers(0, 30)
)
def test_whatever_comes_bounds_steps_and_cooldowns_hold(needs: list[tuple[int, int, float]], begin: int) -> None:
    made, now, ups, downs = steps(begin), 0.0, [-1e9], [-1e9]
    assert made.asked is not None
    for up_to, more, passed_s in needs:
        now += passed_s
        before, after = made.asked, made.take(Need(up_to, up_to + more), now)
        assert 1 <= after <= 20
        assert -2 <= after - before <= 4
        if after > before:
            assert now - ups[-1] >= 60.0
            ups.append(now)
        if after < before:
            assert now - max(ups[-1], downs[-1]) >= 300.0
            downs.append(now)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.floats(1.0, 400.0)), max_size=60), st.integers(0, 30)
)
def test_whatever_comes_no_way_down_saves_less_than_it_costs(needs: list[tuple[int, int, float]], begin: int) -> None:
    made, now = steps(begin, PAID), 0.0
    made.begin(begin, 0.0)
    assert made.asked is not None
    idle_s = 0.0
    for up_to, more, passed_s in needs:
        now += passed_s
        before, after = made.asked, made.take(Need(up_to, up_to + more), now)
        idle_s += before * passed_s
        if after < before:
            assert idle_s >= 900.0  # all that was there, needed or not, is more than what was idle
            idle_s = 0.0


def test_what_it_says_of_itself() -> None:
    assert repr(steps(3)) == "<steps 3 asked for, 0 changes>"
    with pytest.raises(AssertionError):
        Steps(FREE).take(Need(1, 1), 0.0)
