from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.core.admission.fairness import MAX_TENANTS, OUTPUT_WEIGHT, Counters, charge_tokens


def test_output_counts_by_its_weight_and_nothing_is_for_nothing() -> None:
    assert charge_tokens(100, 10) == 100 + 10 * OUTPUT_WEIGHT
    assert charge_tokens(0, 0) == 1.0


def test_who_comes_back_is_lifted_to_the_least_of_those_who_wait() -> None:
    counters = Counters()
    counters.begin("a")
    counters.charge("a", 500)
    counters.begin("b")
    counters.charge("b", 200)
    counters.begin("late")
    assert counters.of("late") == 500  # b began where a stood
    assert counters.of("b") == 700


def test_a_pause_is_no_credit_and_no_debt_is_forgotten() -> None:
    counters = Counters()
    for tenant in "ab":
        counters.begin(tenant)
    counters.charge("a", 100)
    counters.end("a")
    counters.charge("b", 5000)
    counters.begin("a")
    assert counters.of("a") == 5000
    counters.charge("a", 300)
    counters.end("a")
    counters.begin("a")
    assert counters.of("a") == 5300


def test_with_nobody_waiting_one_begins_where_the_last_one_stood() -> None:
    counters = Counters()
    counters.begin("a")
    counters.charge("a", 900)
    counters.end("a")
    counters.begin(None)
    assert counters.of(None) == 900


def test_a_correction_changes_the_counter_but_brings_nobody_back() -> None:
    counters = Counters()
    counters.begin("a")
    counters.charge("a", 900)
    counters.correct("a", -400)
    counters.correct("stranger", -400)
    assert counters.of("a") == 500
    assert len(counters) == 1


def test_tenants_are_bounded_and_those_ahead_are_remembered() -> None:
    counters = Counters()
    counters.begin("waits")
    for i in range(3 * MAX_TENANTS):
        counters.charge(f"t{i}", i + 1.0)
    assert len(counters) <= MAX_TENANTS + 1
    assert counters.of(f"t{3 * MAX_TENANTS - 1}") == 3 * MAX_TENANTS
    assert counters.of("waits") == 0.0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), max_size=200), st.integers(0, 3))
def test_service_of_tenants_that_wait_differs_by_at_most_twice_the_largest_charge(
    costs: list[tuple[str, int]], late: int
) -> None:
    """Theorem 4.4 of the paper, of any interval in which both wait: each time the least counter is served."""
    counters, waiting = Counters(), ["a", "b"]
    for tenant in waiting:
        counters.begin(tenant)
    served: list[dict[str, float]] = [dict.fromkeys("abcd", 0.0)]
    for i, (_, cost) in enumerate(costs):
        if i == 10 * (late + 1):
            waiting.append("c")
            counters.begin("c")
            served = [dict.fromkeys("abcd", 0.0)]
        chosen = min(waiting, key=counters.of)
        counters.charge(chosen, cost)
        served.append({**served[-1], chosen: served[-1][chosen] + cost})
    most = max((cost for _, cost in costs), default=0)
    for i, before in enumerate(served[::7]):
        for after in served[7 * i :: 5]:
            got = [after[t] - before[t] for t in waiting]
            assert max(got) - min(got) <= 2 * most
