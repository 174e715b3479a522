from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.admission.queue import MAX_LEVELS, Entry, Queue
from extproc.core.observers import Held
from extproc.core.types import Request


def entry(
    number: int,
    *,
    priority: int = 0,
    tenant: str | None = None,
    tokens: float = 100.0,
    key: float | None = None,
    size: int = 10,
    at: float | None = None,
    deadline: float = 30.0,
) -> Entry:
    return Entry(
        held=Held("p", f"w{number}", priority, tenant),
        request=Request(body_bytes=size, priority=priority, tenant=tenant),
        tokens=tokens,
        key=float(number) if key is None else key,
        arrived_at=float(number) if at is None else at,
        deadline=deadline,
        by_slo=False,
        number=number,
    )


def queue(*entries: Entry, requests: int = 100, size: int = 10_000) -> Queue:
    made = Queue(requests, size)
    for each in entries:
        assert made.add(each) == []
    made.check()
    return made


def order(made: Queue) -> list[int]:
    return [each.number for each in made.order()]


def numbers(entries: list[Entry]) -> list[int]:
    return [each.number for each in entries]


def test_higher_priority_goes_first() -> None:
    assert order(queue(entry(1), entry(2, priority=5), entry(3, priority=-1))) == [2, 1, 3]


def test_of_one_tenant_the_smallest_key_goes_first() -> None:
    assert order(queue(entry(1, key=3.0), entry(2, key=1.0), entry(3, key=2.0))) == [2, 3, 1]


def test_the_tenant_that_got_least_goes_first() -> None:
    made = queue(entry(1, tenant="a"), entry(2, tenant="b"), entry(3, tenant="a"))
    made.charge(0, "a", 100.0)
    assert order(made) == [2, 1, 3]


def test_unknown_tenants_are_one() -> None:
    made = queue(entry(1), entry(2, tenant="b"), entry(3))
    made.charge(0, None, 100.0)
    assert order(made) == [2, 1, 3]


def test_what_a_tenant_got_at_one_priority_does_not_count_at_another() -> None:
    made = queue(entry(1, tenant="a"), entry(2, tenant="b"))
    made.charge(7, "a", 100.0)
    assert order(made) == [1, 2]


def test_the_starved_one_is_the_oldest_below_the_highest_priority() -> None:
    made = queue(entry(1, priority=9), entry(2, priority=1), entry(3), entry(4, priority=9))
    starved = made.starved(2.0)
    assert starved is not None
    assert starved.number == 2
    assert made.starved(1.9) is None
    assert queue(entry(1)).starved(99.0) is None


def test_deadlines_are_told_the_earliest_first() -> None:
    made = queue(entry(1, deadline=9.0), entry(2, deadline=4.0))
    assert made.next_deadline == 4.0
    assert made.overdue(3.9) is None
    found = made.overdue(4.0)
    assert found is not None
    made.remove(found)
    made.check()
    assert (order(made), made.next_deadline) == ([1], 9.0)


# --- who is given up ----------------------------------------------------------------------------------------------------


def test_a_newcomer_of_lower_priority_than_all_is_refused() -> None:
    made = queue(entry(1, priority=1), entry(2, priority=2), requests=2)
    newcomer = entry(3)
    assert made.add(newcomer) == [newcomer]
    assert order(made) == [2, 1]


def test_one_of_the_lowest_priority_goes_for_a_newcomer_of_a_higher() -> None:
    made = queue(entry(1, priority=1), entry(2), entry(3), requests=3)
    assert numbers(made.add(entry(4, priority=1))) == [3]
    made.check()
    assert order(made) == [1, 4, 2]


def test_the_tenant_with_the_most_tokens_waiting_gives_up_its_last() -> None:
    made = queue(
        entry(1, tenant="flood"), entry(2, tenant="flood"), entry(3, tenant="modest", tokens=150.0), requests=3
    )
    assert numbers(made.add(entry(4, tenant="new"))) == [2]
    made.check()


def test_the_newcomer_of_that_tenant_is_refused_if_it_would_be_last_and_else_displaces_its_own() -> None:
    made = queue(entry(1, tenant="flood"), entry(2, tenant="flood"), entry(3, tenant="modest"), requests=3)
    assert numbers(made.add(entry(4, tenant="flood"))) == [4]
    assert numbers(made.add(entry(5, tenant="flood", key=0.0))) == [2]


def test_bytes_are_bounded_and_several_may_go_for_a_large_one() -> None:
    made = queue(*(entry(i, size=10) for i in range(5)), size=50)
    assert numbers(made.add(entry(9, priority=1, size=25))) == [4, 3, 2]
    made.check()
    assert made.bytes == 45


def test_nobody_goes_for_one_that_finds_no_room_all_the_same() -> None:
    made = queue(entry(1, size=10), entry(2, priority=5, size=40), size=50)
    large = entry(3, priority=1, size=30)
    assert made.add(large) == [large]
    made.check()
    assert order(made) == [2, 1]
    too_large = entry(4, priority=9, size=51)
    assert made.add(too_large) == [too_large]


def test_priorities_that_nobody_uses_any_more_are_forgotten() -> None:
    made = queue()
    for i in range(1000):
        made.add(one := entry(i, priority=i))
        made.remove(one)
    assert len(made._levels) <= MAX_LEVELS + 1
    made.forget()
    assert made._levels == {}


# --- position -----------------------------------------------------------------------------------------------------------


def test_what_goes_before_a_newcomer_is_what_is_more_urgent_and_a_fair_share_of_the_rest() -> None:
    made = queue(
        entry(1, priority=1, tokens=7.0),
        entry(2, tenant="flood", tokens=1000.0),
        entry(3, tenant="own", key=1.0, tokens=10.0),
        entry(4, tenant="own", key=9.0, tokens=10.0),
    )
    assert made.ahead(0, "own", 5.0) == pytest.approx(7 + 10 + 10)
    assert made.ahead(0, "other", 5.0) == 7.0
    assert made.ahead(2, "own", 5.0) == 0.0
    assert made.ahead(-3, "own", 5.0) == pytest.approx(1027.0)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["a", "b", None]),
            st.integers(1, 50),
            st.integers(0, 40),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_counts_and_bytes_stay_within_their_bounds_and_nobody_is_lost(
    script: list[tuple[int, str | None, int, int, bool]],
) -> None:
    made, waiting = Queue(8, 100), set()
    for number, (priority, tenant, tokens, size, goes) in enumerate(script):
        one = entry(number, priority=priority, tenant=tenant, tokens=tokens, size=size, key=float(size))
        gone = made.add(one)
        waiting.add(number)
        waiting -= set(numbers(gone))
        assert all(each.held.priority <= priority for each in gone)
        if goes and len(made):
            first = next(made.order())
            made.remove(first)
            waiting.discard(first.number)
        made.check()
        assert len(made) <= 8
        assert made.bytes <= 100
        assert {each.number for each in made} == waiting
