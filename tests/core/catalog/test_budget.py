"""What was spent in 24 hours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.catalog.budget import SLICE_S, SLICES, Budget

DAY_S = SLICE_S * SLICES


def test_without_a_limit_everything_is_allowed() -> None:
    budget = Budget(None)
    budget.spend(1e9, 0.0)
    assert budget.allows(1e9, 0.0)
    assert budget.spent(0.0) == 1e9


def test_what_was_spent_comes_back_after_a_day() -> None:
    budget = Budget(10.0)
    budget.spend(6.0, 100.0)
    budget.spend(4.0, 7200.0)
    assert budget.allows(0.0, 7200.0)
    assert not budget.allows(0.1, 7200.0)
    assert budget.wait_s(7200.0) == DAY_S - 7200.0
    assert budget.allows(6.0, DAY_S)
    assert not budget.allows(6.1, DAY_S)
    assert budget.spent(2 * DAY_S) == 0.0
    assert budget.wait_s(2 * DAY_S) is None


def test_what_was_reserved_and_not_used_is_given_back() -> None:
    budget = Budget(10.0)
    budget.spend(8.0, 0.0)
    budget.spend(-5.0, 3.0)
    assert budget.spent(3.0) == pytest.approx(3.0)
    budget.spend(-9.0, 2 * DAY_S)  # of a reservation that time has taken already
    assert budget.spent(2 * DAY_S) == 0.0


@given(st.lists(st.tuples(st.floats(0, 4 * DAY_S), st.floats(0, 5)), max_size=60))
def test_no_more_than_the_limit_in_any_day_and_bounded_in_size(events: list[tuple[float, float]]) -> None:
    budget, spent = Budget(10.0), []
    for now, amount in sorted(events):
        if budget.allows(amount, now):
            budget.spend(amount, now)
            spent.append((now, amount))
            hour = now // SLICE_S
            assert sum(a for at, a in spent if at // SLICE_S > hour - SLICES) <= 10.0 + 1e-9
        assert len(budget._slices) <= SLICES
