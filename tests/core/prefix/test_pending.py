"""Prompts on their way, against comparing with each of them in turn."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.prefix.exact import MAX_UNITS, UNIT, token_chain
from extproc.core.prefix.pending import ANCHORS, LATEST, MAX_OPEN, Pending


def chain(*blocks: int) -> tuple[int, ...]:
    return token_chain([block for block in blocks for _ in range(UNIT)]).hashes


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_anchors_are_close_at_first_and_cover_any_prompt() -> None:
    assert ANCHORS[:8] == (1, 2, 3, 4, 5, 6, 7, 8)
    assert all(b <= a * 1.25 + 1 for a, b in pairwise(ANCHORS))
    assert MAX_UNITS / 1.25 < ANCHORS[-1] <= MAX_UNITS
    assert len(ANCHORS) < 60


def test_what_was_sent_will_be_there() -> None:
    made = Pending()
    made.insert("f", "a", chain(1, 2, 3))
    assert made.extend(chain(1, 2, 9), {}) == {"a": 2}
    assert made.extend(chain(1, 2, 3, 4), {"a": 1, "b": 1}) == {"a": 3}
    assert made.extend(chain(1, 2, 3), {"a": 3}) == {}
    assert made.extend(chain(4), {}) == {}
    assert made.extend((), {}) == {}


def test_what_ended_counts_no_more() -> None:
    made = Pending()
    made.insert("f", "a", chain(1, 2))
    made.insert("g", "a", chain(1, 2, 3))
    made.remove("g")
    assert made.extend(chain(1, 2, 3), {}) == {"a": 2}
    made.remove("f")
    made.remove("f")
    made.check()
    assert made.extend(chain(1, 2, 3), {}) == {}
    assert len(made) == 0


def test_what_another_replica_has_now_counts_there() -> None:
    made = Pending()
    made.insert("f", "a", chain(1, 2))
    made.move("f", "b")
    made.move("unheard of", "b")
    made.check()
    assert made.extend(chain(1, 2), {}) == {"b": 2}


def test_a_replica_that_lost_everything_has_nothing_pending() -> None:
    made = Pending()
    made.insert("f", "a", chain(1, 2))
    made.insert("g", "b", chain(1))
    made.clear("a")
    made.check()
    assert made.extend(chain(1, 2), {}) == {"b": 1}


def test_a_prompt_without_a_whole_block_is_nothing() -> None:
    made = Pending()
    made.insert("f", "a", ())
    assert len(made) == 0


def test_no_more_are_kept_than_may_be() -> None:
    made = Pending()
    for i in range(MAX_OPEN + 3):
        made.insert(f"f{i}", "a", chain(i % 5))
    assert len(made) == MAX_OPEN
    made.remove(f"f{MAX_OPEN + 1}")
    assert len(made) == MAX_OPEN


def test_of_many_alike_the_latest_are_looked_at() -> None:
    made = Pending()
    made.insert("old", "a", chain(1, 2))
    for i in range(LATEST):
        made.insert(f"f{i}", "a", chain(1, 7))
    assert made.extend(chain(1, 2, 3), {}) == {"a": 2}  # under an anchor of its own
    long = tuple(range(100, 200))
    made.insert("long", "b", chain(*long))
    for i in range(LATEST):
        made.insert(f"g{i}", "b", chain(*long[:97], i))
    assert max(a for a in ANCHORS if a <= 100) == 97
    assert made.extend(chain(*long), {}) == {"b": 97}  # of the long one, which is older, the rest would be there too


def test_of_those_under_one_anchor_the_one_with_most_in_common_counts() -> None:
    made, head = Pending(), tuple(range(10, 18))
    assert len(head) in ANCHORS
    assert len(head) + 1 not in ANCHORS
    made.insert("more", "a", chain(*head, 1, 2))
    made.insert("less", "a", chain(*head, 3, 4))
    assert made.extend(chain(*head, 1, 5), {"a": 2}) == {"a": 9}
    assert made.extend(chain(*head, 3, 5), {}) == {"a": 9}


def test_a_prompt_shorter_than_what_is_known_adds_nothing() -> None:
    made = Pending()
    made.insert("f", "a", chain(1, 2))
    assert made.extend(chain(1, 2, 3, 4), {"a": 3}) == {}


BLOCKS = st.lists(st.integers(0, 1), max_size=40).map(tuple)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), BLOCKS), max_size=LATEST),
    BLOCKS,
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 6)),
)
def test_it_finds_the_longest_part_in_common(
    sent: list[tuple[str, tuple[int, ...]]], asked: tuple[int, ...], known: dict[str, int]
) -> None:
    made, wanted = Pending(), chain(*asked)
    expected = {address: n for address, n in known.items() if n <= len(wanted)}
    for i, (address, blocks) in enumerate(sent):
        made.insert(f"f{i}", address, chain(*blocks))
        expected[address] = max(expected.get(address, 0), common(wanted, chain(*blocks)))
    held = {address: n for address, n in known.items() if n <= len(wanted)}
    assert held | made.extend(wanted, held) == {a: n for a, n in expected.items() if n or a in held}
    made.check()


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["in", "out", "move", "clear"]), BLOCKS), max_size=40)
)
def test_nothing_is_left_behind(acts: list[tuple[str, str, tuple[int, ...]]]) -> None:
    made = Pending()
    for i, (where, act, blocks) in enumerate(acts):
        flight = f"f{i - len(blocks)}"
        match act:
            case "in":
                made.insert(f"f{i}", where, chain(*blocks))
            case "out":
                made.remove(flight)
            case "move":
                made.move(flight, where)
            case "clear":
                made.clear(where)
        made.check()
    for address in "abcd":
        made.clear(address)
    assert len(made) == 0
