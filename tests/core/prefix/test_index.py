from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.prefix.index import UNKNOWN_CAPACITY_BYTES, PrefixIndex
from extproc.core.types import Blocks


def blocks(*hashes: int, size: int = 10) -> Blocks:
    return Blocks(hashes, tuple(size * (i + 1) for i in range(len(hashes))))


def index(capacity: float = 1e9, max_entries: int = 1000, names: Sequence[str] = ("a", "b", "c")) -> PrefixIndex:
    made = PrefixIndex(max_entries)
    for name in names:
        made.set_capacity(name, capacity)
    return made


# --- matching ---------------------------------------------------------------------------------------------------------


def test_nobody_holds_an_unknown_prompt() -> None:
    made = index()
    assert made.match(blocks(1, 2)) == {}
    assert made.match(blocks()) == {}


def test_a_match_is_contiguous_from_the_start() -> None:
    made = index()
    made.insert("a", blocks(1, 2, 3))
    made.insert("b", blocks(1))
    made.insert("c", Blocks((2, 3), (10, 20)))  # holds the middle, not the head
    assert made.match(blocks(1, 2, 3, 4)) == {"a": 30, "b": 10}
    assert made.match(blocks(1, 9)) == {"a": 10, "b": 10}
    assert made.match(blocks(9, 1, 2)) == {}
    made.check()


def test_matching_changes_nothing() -> None:
    made = index(capacity=20)
    made.insert("a", blocks(1))
    made.insert("a", blocks(2))
    made.match(blocks(1))  # would make it the most recent
    made.insert("a", blocks(3))
    assert (made.match(blocks(1)), made.match(blocks(2))) == ({}, {"a": 10})


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_replica_holds_no_more_than_its_capacity_least_recently_used_first_out() -> None:
    made = index(capacity=30)
    made.insert("a", blocks(1))
    made.insert("a", blocks(2))
    made.insert("a", blocks(3))
    made.insert("a", blocks(1))
    made.insert("a", blocks(4))
    assert made.held_bytes("a") == 30
    assert made.match(blocks(2)) == {}
    assert made.match(blocks(1)) == {"a": 10}
    made.check()


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    made = index(capacity=40)
    made.insert("a", blocks(1, 2, 3))
    made.insert("a", blocks(4, 5))
    assert made.match(blocks(1, 2, 3)) == {"a": 20}
    assert made.match(blocks(4, 5)) == {"a": 20}


def test_a_prompt_larger_than_the_cache_leaves_its_head() -> None:
    made = index(capacity=25)
    made.insert("a", blocks(1, 2, 3, 4))
    assert made.match(blocks(1, 2, 3, 4)) == {"a": 20}


def test_a_smaller_capacity_evicts_at_once() -> None:
    made = index()
    made.insert("a", blocks(1, 2, 3, 4))
    made.set_capacity("a", 15)
    assert made.held_bytes("a") == 10
    made.check()


def test_a_replica_that_tells_no_capacity_has_the_assumed_one() -> None:
    made = PrefixIndex()
    big = Blocks(tuple(range(1, 20)), tuple(100_000 * i for i in range(1, 20)))
    made.insert("a", big)
    assert made.held_bytes("a") == UNKNOWN_CAPACITY_BYTES


def test_over_all_replicas_the_largest_holder_gives_way() -> None:
    made = index(max_entries=10)
    made.insert("a", blocks(1, 2))
    made.insert("b", blocks(*range(10, 18)))
    made.insert("a", blocks(3, 4))
    assert len(made) == 10
    assert made.match(blocks(1, 2)) == {"a": 20}
    assert made.match(blocks(3, 4)) == {"a": 20}
    assert made.held_bytes("b") == 60
    made.check()


def test_one_insert_may_exceed_the_whole_index() -> None:
    made = index(max_entries=3)
    made.insert("a", blocks(1))
    made.insert("b", blocks(*range(10, 30)))
    assert len(made) == 3
    made.check()


# --- settling ---------------------------------------------------------------------------------------------------------


def test_what_a_failed_flight_brought_is_withdrawn_and_what_was_there_stays() -> None:
    made = index()
    made.insert("a", blocks(1))
    made.insert("a", blocks(1, 2, 3), "f")
    made.withdraw("a", blocks(1, 2, 3), "f")
    assert made.match(blocks(1, 2, 3)) == {"a": 10}
    made.withdraw("a", blocks(1, 2, 3), "f")
    assert made.match(blocks(1, 2, 3)) == {"a": 10}
    made.check()


def test_what_was_kept_cannot_be_withdrawn() -> None:
    made = index()
    made.insert("a", blocks(1, 2), "f")
    made.keep("a", blocks(1, 2))
    made.withdraw("a", blocks(1, 2), "f")
    assert made.match(blocks(1, 2)) == {"a": 20}


def test_what_another_flight_computed_meanwhile_stays() -> None:
    made = index()
    made.insert("a", blocks(1, 2), "failing")
    made.insert("a", blocks(1, 2, 3), "working")
    made.keep("a", blocks(1, 2, 3))
    made.withdraw("a", blocks(1, 2), "failing")
    assert made.match(blocks(1, 2, 3)) == {"a": 30}


def test_what_was_withdrawn_too_early_comes_back_when_another_flight_has_computed_it() -> None:
    made = index()
    made.insert("a", blocks(1, 2), "failing")
    made.insert("a", blocks(1, 2, 3), "working")
    made.withdraw("a", blocks(1, 2), "failing")
    made.keep("a", blocks(1, 2, 3))
    assert made.match(blocks(1, 2, 3)) == {"a": 30}
    made.check()


def test_what_was_evicted_and_brought_again_belongs_to_the_second_flight() -> None:
    made = index(capacity=10)
    made.insert("a", blocks(1), "first")
    made.insert("a", blocks(2))
    made.insert("a", blocks(1), "second")
    made.withdraw("a", blocks(1), "first")
    assert made.match(blocks(1)) == {"a": 10}
    made.withdraw("a", blocks(1), "second")
    assert made.match(blocks(1)) == {}
    made.check()


def test_withdrawing_from_an_unknown_replica_makes_no_room_for_it() -> None:
    made = PrefixIndex()
    made.withdraw("a", blocks(1), "f")
    made.clear("a")
    made.forget("a")
    assert made.addresses == frozenset()
    assert made.held_bytes("a") == 0


# --- replicas that restart and leave ----------------------------------------------------------------------------------


def test_a_restart_empties_one_replica() -> None:
    made = index()
    for name in ("a", "b"):
        made.insert(name, blocks(1, 2))
    made.clear("a")
    assert made.match(blocks(1, 2)) == {"b": 20}
    made.insert("a", blocks(1))
    assert made.match(blocks(1)) == {"a": 10, "b": 10}
    made.check()


def test_a_bit_used_again_brings_none_of_its_last_owner() -> None:
    made = index()
    for name in ("a", "b", "c"):
        made.insert(name, blocks(1))
    made.forget("b")
    made.insert("d", blocks(2))
    assert made.match(blocks(1)) == {"a": 10, "c": 10}
    assert made.match(blocks(2)) == {"d": 10}
    assert made.addresses == {"a", "c", "d"}
    made.check()


def test_replicas_that_come_and_go_do_not_widen_the_masks() -> None:
    made = PrefixIndex()
    for i in range(1000):
        made.insert(f"r{i}", blocks(1, 2, i + 10))
        made.forget(f"r{i - 3}")
        made.check()
    assert max(made._owners) <= 1 << 4
    assert len(made) == 9


def test_repr_is_a_status_line() -> None:
    made = index(names=["a"])
    made.insert("a", blocks(1, 2))
    assert repr(made) == "<prefix index 2 entries, 2 blocks, 1 replicas>"


# --- properties -------------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "d"])
chains = st.lists(st.integers(1, 12), min_size=0, max_size=6, unique=True).map(lambda h: blocks(*h))
flights = st.sampled_from(["f", "g", "h", None])
acts = st.lists(
    st.tuples(
        st.sampled_from(["insert", "keep", "withdraw", "clear", "forget", "capacity"]),
        names,
        chains,
        flights,
        st.integers(0, 80),
    ),
    max_size=60,
)


@pytest.mark.parametrize("limit", [5, 1000])
@given(script=acts)
def test_whatever_happens_the_index_is_consistent_and_bounded(
    limit: int, script: list[tuple[str, str, Blocks, str | None, int]]
) -> None:
    made = PrefixIndex(limit)
    for act, name, chain, flight, size in script:
        match act:
            case "insert":
                made.insert(name, chain, flight)
            case "keep":
                made.keep(name, chain)
            case "withdraw":
                made.withdraw(name, chain, flight or "f")
            case "clear":
                made.clear(name)
            case "forget":
                made.forget(name)
            case _:
                made.set_capacity(name, size)
        made.check()
        assert len(made) <= limit
        for holder, covered in made.match(chain).items():
            assert holder in made.addresses
            assert covered in chain.ends


@given(st.lists(st.tuples(names, chains), max_size=20), chains)
def test_a_match_is_what_a_set_per_replica_would_say(inserted: list[tuple[str, Blocks]], asked: Blocks) -> None:
    made = index(names=[])
    sets: dict[str, set[int]] = {}
    for name, chain in inserted:
        made.insert(name, chain)
        sets.setdefault(name, set()).update(chain.hashes)
    expected = {}
    for name, held in sets.items():
        n = next((i for i, h in enumerate(asked.hashes) if h not in held), len(asked.hashes))
        if n:
            expected[name] = asked.ends[n - 1]
    assert made.match(asked) == expected
