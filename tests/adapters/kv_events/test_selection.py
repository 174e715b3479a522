from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.adapters.kv_events.selection import Passed, Selection, blocks, sliced
from extproc.adapters.kv_events.wire import decode
from extproc.core.types import BlocksRemoved, BlocksStored, CacheChange, CacheCleared
from tests.adapters.kv_events.support import CLEARED, payload, removed, stored, tokens


def take(*events: Any, selection: Selection | None = None) -> list[CacheChange]:
    return (selection or Selection()).take(decode(payload(*events)))


def passed(*events: Any) -> dict[Passed, int]:
    selection = Selection()
    take(*events, selection=selection)
    return {why: n for why, n in selection.tally.passed.items() if n}


class TestTiers:
    @pytest.mark.parametrize("medium", ["CPU", "STORAGE", "DISK"])
    def test_other_tiers_do_not_count(self, medium: str) -> None:
        assert take(stored(1, medium=medium), removed(1, medium=medium)) == []
        assert passed(stored(1, medium=medium), removed(1, medium=medium)) == {Passed.TIER: 2}

    def test_what_leaves_the_cpu_stays_on_the_gpu(self) -> None:
        assert take(stored(1), stored(1, medium="CPU"), removed(1, medium="CPU")) == take(stored(1))

    def test_remote_blocks_do_not_count(self) -> None:
        assert passed(stored(1, locality="REMOTE")) == {Passed.TIER: 1}
        assert len(take(stored(1, locality="LOCAL"))) == 1

    def test_no_medium_is_the_gpu(self) -> None:
        assert len(take(stored(1, medium=None), removed(1, medium=None))) == 2


FULL: dict[str, Any] = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
WINDOW: dict[str, Any] = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 128}


class TestGroups:
    def test_a_window_does_not_count(self) -> None:
        assert take(stored(1, **FULL), stored(1, **WINDOW)) == [BlocksStored((1,), None, tokens(1), 2)]
        assert passed(stored(1, **FULL), stored(1, **WINDOW), removed(1, group_idx=1)) == {Passed.GROUP: 2}

    def test_a_window_that_slides_takes_no_prefix_away(self) -> None:
        assert take(stored(1, **FULL), removed(1, group_idx=1), removed(2, group_idx=0))[1:] == [BlocksRemoved((2,))]

    def test_the_first_with_full_attention_counts_whatever_its_number(self) -> None:
        events = stored(1, **WINDOW), stored(1, **{**FULL, "group_idx": 2}), stored(1, **{**FULL, "group_idx": 3})
        assert len(take(*events)) == 1
        assert take(*events, removed(1, group_idx=2), removed(1, group_idx=3))[1:] == [BlocksRemoved((1,))]

    @pytest.mark.parametrize("kind", ["mla_attention", "sink_full_attention"])
    def test_other_kinds_that_keep_whole_prefixes(self, kind: str) -> None:
        assert len(take(stored(1, group_idx=0, kv_cache_spec_kind=kind))) == 1

    def test_a_kind_that_is_not_told_is_taken_for_the_first(self) -> None:
        assert take(stored(1, group_idx=0), stored(1, group_idx=1), removed(1, group_idx=1)) == take(stored(1))

    def test_an_engine_that_began_anew_may_have_others(self) -> None:
        selection = Selection()
        take(stored(1, **FULL), selection=selection)
        selection.anew()
        assert len(take(stored(1, **{**FULL, "group_idx": 1}), selection=selection)) == 1


class TestKeys:
    def test_adapter(self) -> None:
        event = stored(1, 2, lora_id=1, lora_name="a", extra_keys=[["a"], ["a"]])
        assert take(event) == [BlocksStored((1, 2), None, tokens(1) + tokens(2), 2, "a")]

    def test_adapter_and_salt(self) -> None:
        event = stored(1, 2, lora_id=1, lora_name="a", extra_keys=[["a", "pepper"], ["a"]])
        assert take(event) == [BlocksStored((1, 2), None, tokens(1) + tokens(2), 2, "a", "pepper")]

    def test_a_salt_may_be_called_like_an_adapter(self) -> None:
        assert take(stored(1, extra_keys=[["a"]])) == [BlocksStored((1,), None, tokens(1), 2, None, "a")]

    def test_the_salt_of_sglang(self) -> None:
        assert take(stored(1, cache_salt="pepper")) == [BlocksStored((1,), None, tokens(1), 2, None, "pepper")]

    def test_an_adapter_without_a_name_does_not_count(self) -> None:
        assert passed(["BlockStored", [1], None, [10, 11], 2, 3]) == {Passed.ADAPTER: 1}

    @pytest.mark.parametrize("keys", [[["image", 3]], [b"digest"], ["salt", ["image", 0]], ["two", "texts"]])
    def test_a_chain_ends_before_what_tokens_do_not_tell(self, keys: list[Any]) -> None:
        assert take(stored(1, extra_keys=[keys])) == []
        assert passed(stored(1, extra_keys=[keys])) == {Passed.CONTENT: 1}

    def test_what_comes_before_counts(self) -> None:
        event = stored(1, 2, 3, extra_keys=[["pepper"], [["image", 0]], None])
        assert take(event) == [BlocksStored((1,), None, tokens(1), 2, None, "pepper")]
        assert passed(event) == {Passed.CONTENT: 1}

    def test_a_text_in_a_later_block_is_no_salt(self) -> None:
        assert take(stored(1, 2, extra_keys=[None, ["image"]])) == take(stored(1))
        assert take(stored(2, parent=1, extra_keys=[["image"]])) == []


class TestRanks:
    def test_the_first_keeps_its_ids(self) -> None:
        assert take(stored(5, parent=4), selection=Selection(0)) == [BlocksStored((5,), 4, tokens(5), 2)]

    def test_others_have_other_ids_and_the_same_links(self) -> None:
        first, then, gone = take(stored(5), stored(6, parent=5), removed(5), selection=Selection(3))
        assert isinstance(first, BlocksStored)
        assert isinstance(then, BlocksStored)
        assert isinstance(gone, BlocksRemoved)
        assert first.ids == gone.ids == (then.parent,)
        assert first.ids != (5,)
        assert first.token_ids == tokens(5)

    def test_ids_of_two_ranks_differ_in_either_form(self) -> None:
        ids = {
            change.ids
            for rank in range(4)
            for change in take(removed(2**64 - 1), removed(bytes(32)), removed(-5), selection=Selection(rank))
            if isinstance(change, BlocksRemoved)
        }
        assert len(ids) == 12


@pytest.mark.parametrize(
    "event", [stored(), stored(1, size=0), {**stored(1), "token_ids": [1]}, {**stored(1, 2), "block_size": 3}]
)
def test_tokens_that_do_not_fill_the_blocks_are_malformed(event: dict[str, Any]) -> None:
    assert passed(event) == {Passed.MALFORMED: 1}


class TestSlices:
    def test_a_long_chain_is_divided_where_blocks_end(self) -> None:
        whole = BlocksStored((1, 2, 3), 9, tokens(1) + tokens(2) + tokens(3), 2, "a", "pepper")
        assert list(sliced([whole], 2)) == [
            (BlocksStored((1, 2), 9, tokens(1) + tokens(2), 2, "a", "pepper"),),
            (BlocksStored((3,), 2, tokens(3), 2, "a"),),
        ]

    @settings(deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.integers(1, 40).map(lambda n: ("s", n)), st.integers(0, 9).map(lambda n: ("r", n)), st.just(("c", 0))
            )
        ),
        st.integers(1, 12),
    )
    def test_nothing_is_lost_and_no_part_is_too_large(self, shapes: list[tuple[str, int]], most: int) -> None:
        changes: list[CacheChange] = []
        for kind, n in shapes:
            ids = tuple(range(n))
            if kind == "s":
                changes.append(BlocksStored(ids, None, tuple(t for i in ids for t in tokens(i)), 2))
            else:
                changes.append(BlocksRemoved(ids) if kind == "r" else CacheCleared())
        parts = list(sliced(changes, most))
        assert all(sum(map(blocks, part)) <= most for part in parts)
        assert flat(parts) == flat([tuple(changes)])


def flat(parts: list[tuple[CacheChange, ...]]) -> list[tuple[Any, ...]]:
    """One entry for each block."""
    found: list[tuple[Any, ...]] = []
    for change in (change for part in parts for change in part):
        if isinstance(change, BlocksStored):
            size = change.size
            found += (("s", i, change.token_ids[n * size : n * size + size]) for n, i in enumerate(change.ids))
        elif isinstance(change, BlocksRemoved):
            found += (("r", i) for i in change.ids)
        else:
            found.append(("c",))
    return found


def test_a_clear_counts() -> None:
    assert take(CLEARED) == [CacheCleared()]
