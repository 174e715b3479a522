"""The exact index, rule by rule, and against engines that remember everything in the plainest way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.prefix.exact import MAX_UNITS, ONE_RESTART_S, UNIT, ExactIndex, Ignored, token_chain
from extproc.core.types import BlockId, BlocksRemoved, BlocksStored, CacheChange, CacheCleared


def prompt(*blocks: int) -> tuple[int, ...]:
    """Token ids of blocks that are told apart by one number each."""
    return tuple(token for block in blocks for token in (block, *range(UNIT - 1)))


def stored(*blocks: int, ids: Sequence[BlockId], parent: BlockId | None = None, **fields: str) -> BlocksStored:
    return BlocksStored(tuple(ids), parent, prompt(*blocks), len(blocks) * UNIT // len(ids), **fields)


def chain(*blocks: int, lora: str | None = None, salt: str | None = None) -> tuple[int, ...]:
    return token_chain(prompt(*blocks), UNIT, lora, salt).hashes


def index(*told: tuple[str, CacheChange], max_entries: int = 1000, max_held: int = 1000) -> ExactIndex:
    made = ExactIndex(max_entries, max_held)
    for address, change in told:
        made.apply(address, [change], 0.0)
        made.check()
    return made


# --- the chain --------------------------------------------------------------------------------------------------------


def test_full_blocks_are_hashed_and_the_tail_left_out() -> None:
    ids = list(range(5 * UNIT - 1))
    assert token_chain(ids).size == UNIT
    assert len(token_chain(ids).hashes) == 4
    assert len(token_chain(ids, limit=3).hashes) == 3
    assert token_chain(ids[: UNIT - 1]).hashes == ()
    assert token_chain([]).hashes == ()
    assert len(token_chain(ids, size=2 * UNIT).hashes) == 2


def test_the_number_of_blocks_is_bounded() -> None:
    assert len(token_chain([1] * (UNIT * (MAX_UNITS + 3))).hashes) == MAX_UNITS


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=0, max_size=6 * UNIT),
    st.lists(st.integers(0, 3), min_size=0, max_size=6 * UNIT),
)
def test_hashes_are_equal_as_far_as_the_tokens_are(a: list[int], b: list[int]) -> None:
    alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) // UNIT
    first, second = token_chain(a).hashes, token_chain(b).hashes
    assert first[:alike] == second[:alike]
    assert not set(first[alike:]) & set(second[alike:])


def test_adapter_and_salt_make_another_chain() -> None:
    variants = [
        (None, None),
        ("a", None),
        (None, "a"),
        ("a", "a"),
        ("", None),
        (None, ""),
        ("a', 'b", None),
        ("a", "b"),
    ]
    assert len({token_chain(prompt(1), UNIT, lora, salt).hashes for lora, salt in variants}) == len(variants)


@pytest.mark.parametrize("token", [-1, 1 << 32])
def test_ids_that_no_tokenizer_gives_are_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        token_chain([token] * UNIT)


# --- matching ---------------------------------------------------------------------------------------------------------


def test_a_match_is_as_long_as_what_the_replica_holds() -> None:
    made = index(("a", stored(1, 2, 3, ids=[11, 12, 13])), ("b", stored(1, ids=[b"one"])), ("c", stored(7, ids=[11])))
    assert made.match(chain(1, 2, 3, 4)) == {"a": 3, "b": 1}
    assert made.match(chain(1, 2)) == {"a": 2, "b": 1}
    assert made.match(chain(1, 9)) == {"a": 1, "b": 1}
    assert made.match(chain(2, 3)) == {}
    assert made.match(()) == {}
    assert (len(made), made.held("a"), made.held("nobody")) == (5, 3, 0)


def test_what_is_stored_later_goes_on_from_its_parent() -> None:
    made = index(
        ("a", stored(1, 2, ids=[11, 12])), ("a", stored(3, ids=[13], parent=12)), ("a", stored(9, ids=[19], parent=11))
    )
    assert made.match(chain(1, 2, 3)) == {"a": 3}
    assert made.match(chain(1, 9)) == {"a": 2}


def test_adapters_and_salts_share_nothing() -> None:
    made = index(
        ("a", stored(1, ids=[1], lora="x")),
        ("b", stored(1, ids=[1], salt="s")),
        ("c", stored(1, 2, ids=[1, 2], lora="x", salt="s")),
    )
    assert made.match(chain(1)) == {}
    assert made.match(chain(1, lora="x")) == {"a": 1}
    assert made.match(chain(1, salt="s")) == {"b": 1}
    assert made.match(chain(1, 2, lora="x", salt="s")) == {"c": 2}


def test_replicas_with_larger_blocks_hold_whole_ones_only() -> None:
    made = index(("small", stored(1, 2, 3, ids=[1, 2, 3])), ("large", stored(1, 2, 3, 4, ids=[1, 2])))
    assert made.match(chain(1, 2, 3)) == {"small": 3, "large": 2}
    assert made.match(chain(1)) == {"small": 1}
    assert made.match(chain(1, 2, 3, 4, 5)) == {"small": 3, "large": 4}
    assert (made.stride("small"), made.stride("large"), made.stride("nobody")) == (1, 2, 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_of_a_long_prompt_any_number_of_replicas_may_hold_any_part(parts: list[int]) -> None:
    blocks = tuple(range(300))
    made = ExactIndex()
    for i, part in enumerate(parts):
        made.apply(f"r{i}", [stored(*blocks[:part], ids=range(part))], 0.0)
    assert made.match(chain(*blocks)) == {f"r{i}": part for i, part in enumerate(parts)}


# --- removals ---------------------------------------------------------------------------------------------------------


def test_what_is_removed_is_gone_there_alone() -> None:
    made = index(("a", stored(1, 2, ids=[11, 12])), ("b", stored(1, 2, ids=[11, 12])), ("a", BlocksRemoved((12,))))
    assert made.match(chain(1, 2)) == {"a": 1, "b": 2}
    made.apply("a", [BlocksRemoved((11, 404))], 0.0)
    made.check()
    assert made.match(chain(1, 2)) == {"b": 2}
    assert made.ignored == Counter({Ignored.UNKNOWN: 1})


def test_a_block_comes_back_when_it_is_stored_again() -> None:
    made = index(("a", stored(1, 2, ids=[11, 12])), ("a", BlocksRemoved((12,))), ("a", stored(2, ids=[12], parent=11)))
    assert made.match(chain(1, 2)) == {"a": 2}


def test_a_block_that_was_computed_twice_is_gone_when_both_are() -> None:
    """Where a prompt is cached as a whole vLLM computes its last block again, and stores it beside the first."""
    made = index(("a", stored(1, 2, ids=[11, 12])), ("a", stored(2, ids=[12], parent=11)), ("a", BlocksRemoved((12,))))
    assert made.match(chain(1, 2)) == {"a": 2}
    made.apply("a", [BlocksRemoved((12,))], 0.0)
    made.check()
    assert made.match(chain(1, 2)) == {"a": 1}


def test_a_prompt_that_is_told_again_is_not_there_twice() -> None:
    """`kv_cache_report_mode: full` reports what a request reuses, from the first block on."""
    again = stored(1, 2, 3, ids=[11, 12, 13])
    made = index(("a", again), ("a", again), ("a", again), ("a", BlocksRemoved((13,))))
    assert made.match(chain(1, 2, 3)) == {"a": 2}
    made.apply("a", [BlocksRemoved((12, 11))], 0.0)
    made.check()
    assert len(made) == 0


def test_a_prompt_that_is_told_again_may_go_on() -> None:
    made = index(("a", stored(1, 2, ids=[11, 12])), ("a", stored(1, 2, 3, ids=[11, 12, 13])))
    assert made.match(chain(1, 2, 3)) == {"a": 3}


def test_a_prompt_told_again_in_pieces_is_not_there_twice() -> None:
    pieces = [stored(1, 2, ids=[11, 12]), stored(3, ids=[13], parent=12), stored(4, ids=[14], parent=13)]
    made = index(*(("a", piece) for piece in (*pieces, *pieces)), ("a", BlocksRemoved((14, 13))))
    assert made.match(chain(1, 2, 3, 4)) == {"a": 2}


def test_one_content_under_two_ids_stays_until_both_are_gone() -> None:
    """Two ranks of one replica."""
    made = index(("a", stored(1, ids=[1])), ("a", stored(1, ids=[b"1"])), ("a", BlocksRemoved((1,))))
    assert made.match(chain(1)) == {"a": 1}
    made.apply("a", [BlocksRemoved((b"1",))], 0.0)
    made.check()
    assert made.match(chain(1)) == {}


# --- what cannot be taken in --------------------------------------------------------------------------------------------


def test_blocks_behind_an_unknown_one_are_counted_and_left_out() -> None:
    made = index(("a", stored(2, 3, ids=[12, 13], parent=11)))
    assert made.match(chain(2, 3)) == {}
    assert made.ignored == Counter({Ignored.ORPHAN: 2})
    assert len(made) == 0


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (BlocksStored((1, 2), None, prompt(1), UNIT), Ignored.MALFORMED),
        (BlocksStored((1,), None, (), 0), Ignored.MALFORMED),
        (BlocksStored((1,), None, (-1,) * UNIT, UNIT), Ignored.MALFORMED),
        (BlocksStored((1,), None, ("x",) * UNIT, UNIT), Ignored.MALFORMED),  # type: ignore[arg-type]  # from a wire
        (BlocksStored((1,), None, tuple(range(8)), 8), Ignored.SIZE),
        (BlocksStored((1,), None, tuple(range(24)), 24), Ignored.SIZE),
    ],
)
def test_what_makes_no_sense_is_counted_and_left_out(told: BlocksStored, why: Ignored) -> None:
    made = index(("a", told))
    assert made.ignored == Counter({why: len(told.ids)})
    assert len(made) == 0


def test_a_replica_whose_blocks_are_no_multiples_of_ours_is_not_followed() -> None:
    made = index(("a", BlocksStored((1,), None, (7,), 1)))
    assert not made.knows("a")
    made.apply("a", [stored(1, ids=[1])], 0.0)
    assert made.ignored[Ignored.FULL] == 1
    made.apply("a", [CacheCleared(), stored(1, ids=[1])], 0.0)
    assert made.knows("a")


def test_blocks_of_another_size_than_the_first_are_left_out() -> None:
    made = index(("a", stored(1, 2, ids=[1, 2])), ("a", stored(3, 4, ids=[3], parent=2)))
    assert made.ignored == Counter({Ignored.SIZE: 1})
    assert made.match(chain(1, 2, 3, 4)) == {"a": 2}


# --- what is known ----------------------------------------------------------------------------------------------------


def test_a_replica_is_known_from_its_first_word_to_the_gap() -> None:
    made = ExactIndex()
    assert not made.knows("a")
    made.apply("a", [], 0.0)
    assert made.knows("a")
    made.apply("a", [stored(1, ids=[1])], 0.0, whole=False)
    assert not made.knows("a")
    assert made.match(chain(1)) == {"a": 1}
    made.forget("a")
    made.check()
    assert made.match(chain(1)) == {}
    assert made.addresses == set()


def test_who_is_forgotten_leaves_room_for_another() -> None:
    made = index(("a", stored(1, ids=[1])), ("b", stored(1, ids=[1])))
    made.forget("a")
    made.forget("a")
    made.apply("c", [stored(1, 2, ids=[1, 2])], 0.0)
    made.check()
    assert made.match(chain(1, 2)) == {"b": 1, "c": 2}


def test_a_cleared_cache_is_known_to_be_empty() -> None:
    made = index(("a", stored(1, ids=[1])), ("a", CacheCleared()))
    assert made.knows("a")
    assert made.match(chain(1)) == {}
    made.apply("a", [stored(1, 2, ids=[1])], 0.0)  # another block size: it is another process
    assert made.match(chain(1, 2)) == {"a": 2}


def test_a_restart_that_was_seen_otherwise_empties_the_cache() -> None:
    made = index(("a", stored(1, ids=[1])))
    made.restarted("a", 5.0)
    made.check()
    assert made.match(chain(1)) == {}
    made.restarted("nobody", 5.0)


def test_after_a_restart_that_the_events_do_not_confirm_what_they_tell_is_the_least() -> None:
    made = index(("a", stored(1, ids=[1])))
    made.restarted("a", 5.0)
    assert not made.knows("a")
    made.apply("a", [stored(1, ids=[1])], 6.0)
    made.check()
    assert (made.knows("a"), made.match(chain(1))) == (False, {"a": 1})
    made.apply("a", [CacheCleared()], 7.0)
    assert (made.knows("a"), made.match(chain(1))) == (True, {})


def test_a_restart_that_the_events_told_first_does_not_empty_it_again() -> None:
    made = ExactIndex()
    made.apply("a", [CacheCleared(), stored(1, ids=[1])], 100.0)
    made.restarted("a", 100.0 + ONE_RESTART_S / 2)
    assert made.match(chain(1)) == {"a": 1}
    made.restarted("a", 100.0 + ONE_RESTART_S)
    assert made.match(chain(1)) == {}


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_replica_with_too_much_is_given_up_until_it_is_empty() -> None:
    made = index(("a", stored(1, 2, 3, ids=[1, 2, 3])), ("b", stored(1, ids=[1])), max_held=2)
    assert (made.knows("a"), made.knows("b"), made.match(chain(1))) == (False, True, {"b": 1})
    made.apply("a", [stored(1, ids=[1]), BlocksRemoved((1,))], 0.0)
    made.check()
    assert (made.held("a"), made.ignored[Ignored.FULL]) == (0, 5)
    made.apply("a", [CacheCleared(), stored(1, ids=[1])], 0.0)
    assert (made.knows("a"), made.held("a")) == (True, 1)


def test_over_all_replicas_the_largest_is_given_up() -> None:
    made = index(("a", stored(1, 2, 3, ids=[1, 2, 3])), ("b", stored(4, 5, ids=[4, 5])), max_entries=4)
    assert (made.knows("a"), made.knows("b"), len(made)) == (False, True, 2)
    made.check()


# --- against the plainest engine ----------------------------------------------------------------------------------------


@dataclass
class Engine:
    """A cache of chains, tail first out, that tells everything. A block is named by what is in it and before it."""

    blocks: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Chain up to the block -> copies of it."""

    def run(self, blocks: tuple[int, ...]) -> list[CacheChange]:
        """Compute a prompt: what is missing, and the last block in any case."""
        have = next((n for n in range(len(blocks) - 1, 0, -1) if self.blocks[blocks[:n]]), 0)
        new = [blocks[:n] for n in range(have + 1, len(blocks) + 1)]
        # What would be a second copy of a first block is told like a report of what is reused: it is not made here.
        if not new or (not have and self.blocks[new[0]]):
            return []
        self.blocks.update(new)
        return [
            BlocksStored(tuple(map(name, new)), name(blocks[:have]) if have else None, prompt(*blocks[have:]), UNIT)
        ]

    def report(self, blocks: tuple[int, ...]) -> list[CacheChange]:
        """Tell what is there of a prompt once more."""
        have = self.holds(blocks)
        return [stored(*blocks[:have], ids=[name(blocks[: n + 1]) for n in range(have)])] if have else []

    def evict(self, place: int) -> list[CacheChange]:
        """One of the blocks that nothing goes on from, or a copy of any."""
        there = sorted(b for b, copies in self.blocks.items() if copies)
        loose = [b for b in there if self.blocks[b] > 1 or not any(o[: len(b)] == b and o != b for o in there)]
        if not loose:
            return []
        gone = loose[place % len(loose)]
        self.blocks[gone] -= 1
        return [BlocksRemoved((name(gone),))]

    def holds(self, blocks: tuple[int, ...]) -> int:
        return next((n for n in range(len(blocks), 0, -1) if self.blocks[blocks[:n]]), 0)


def name(blocks: tuple[int, ...]) -> int:
    return hash(("engine's own", *blocks))


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
ACTS = st.one_of(
    st.tuples(st.just("run"), PROMPTS),
    st.tuples(st.just("report"), PROMPTS),
    st.tuples(st.just("evict"), st.integers(0, 100)),
    st.tuples(st.just("clear"), st.none()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), ACTS), max_size=60), st.lists(PROMPTS, min_size=1, max_size=5))
def test_it_knows_what_the_engines_hold(
    acts: list[tuple[str, tuple[str, object]]], asked: list[tuple[int, ...]]
) -> None:
    engines = {"a": Engine(), "b": Engine()}
    made = ExactIndex()
    for address, (act, what) in acts:
        engine = engines[address]
        if act == "clear":
            engine.blocks.clear()
            changes: list[CacheChange] = [CacheCleared()]
        else:
            changes = getattr(engine, act)(what)
        made.apply(address, changes, 0.0)
        made.check()
    for blocks in asked:
        expected = {address: engine.holds(blocks) for address, engine in engines.items()}
        assert made.match(chain(*blocks)) == {address: n for address, n in expected.items() if n}
    assert made.ignored.total() == 0
    assert len(made) == sum(copies > 0 for engine in engines.values() for copies in engine.blocks.values())


IDS = st.integers(0, 9)
ANY_CHANGE = st.one_of(
    st.builds(
        lambda ids, parent, token, size: BlocksStored(tuple(ids), parent, (token,) * (len(ids) * size), size),
        st.lists(IDS, max_size=3),
        st.none() | IDS,
        st.integers(-1, 2),
        st.sampled_from([0, 1, UNIT, 2 * UNIT]),
    ),
    st.builds(lambda ids: BlocksRemoved(tuple(ids)), st.lists(IDS, max_size=3)),
    st.just(CacheCleared()),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(ANY_CHANGE, max_size=3)), max_size=40))
def test_whatever_is_told_the_books_balance_and_the_bounds_hold(told: list[tuple[str, list[CacheChange]]]) -> None:
    made = ExactIndex(max_entries=12, max_held=6)
    for address, changes in told:
        made.apply(address, changes, 0.0)
        made.check()
        assert all(made.held(a) <= 6 for a in "abc")
        assert made.match(chain(1, 1, 1)).keys() <= made.addresses
    for address in "abc":
        made.forget(address)
        made.check()
    assert len(made) == 0
