from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.kv_events.position import Heard, Position

NEXT, AGAIN, GAP, ANEW = Heard


def test_one_after_the_other() -> None:
    position = Position()
    assert [position.heard(n) for n in (0, 1, 2)] == [NEXT, NEXT, NEXT]
    assert repr(position) == "<due 3, live 2>"


def test_a_gap_stays_until_it_is_filled_or_given_up() -> None:
    position = Position()
    assert position.heard(2) is GAP
    assert [position.replayed(n) for n in (0, 1, 2)] == [NEXT, NEXT, NEXT]
    assert position.heard(5) is GAP
    position.skip_to(5)
    assert position.replayed(5) is NEXT


def test_what_a_replay_brought_first_comes_again() -> None:
    position = Position()
    assert [position.replayed(n) for n in (0, 1, 2)] == [NEXT, NEXT, NEXT]
    assert [position.heard(n) for n in (1, 2, 3)] == [AGAIN, AGAIN, NEXT]


def test_a_number_that_does_not_count_up_is_of_another_process() -> None:
    position = Position()
    for n in range(4):
        position.heard(n)
    assert [position.heard(n) for n in (3, 0, 2)] == [ANEW, ANEW, ANEW]
    position.anew()
    assert position.heard(0) is NEXT


def test_nothing_that_was_skipped_is_due_again() -> None:
    position = Position()
    position.skip_to(7)
    position.skip_to(3)
    assert position.due == 7


@settings(deadline=None)
@given(st.lists(st.integers(0, 6)))
def test_each_number_is_next_at_most_once_and_in_order(numbers: list[int]) -> None:
    position = Position()
    taken = [n for n in numbers if position.replayed(n) is NEXT]
    assert taken == list(range(len(taken)))
