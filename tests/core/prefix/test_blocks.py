"""Chains of blocks: what two prompts share, and the schedule of boundaries."""

from __future__ import annotations

from itertools import pairwise, takewhile

from hypothesis import given
from hypothesis import strategies as st

from extproc.core.prefix.blocks import ENDS, MAX_BLOCKS, chain

lengths = st.integers(0, 120_000)


def filler(length: int, salt: int = 0) -> bytes:
    """Bytes without repetition at block size."""
    return b"".join((i * 2654435761 + salt).to_bytes(8, "big") for i in range(length // 8 + 1))[:length]


@given(head=lengths, one=st.integers(1, 3000), other=st.integers(1, 3000))
def test_prompts_share_exactly_the_blocks_of_their_common_head(head: int, one: int, other: int) -> None:
    a = chain(b"m", filler(head) + b"\x00" * one)
    b = chain(b"m", filler(head) + b"\x01" * other)
    shared = [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.hashes, b.hashes, strict=False))]
    assert len(shared) == sum(end <= head for end in a.ends[: len(b)])
    assert set(a.hashes) & set(b.hashes) == set(shared)


@given(seeds=st.lists(st.binary(max_size=20), min_size=2, max_size=2, unique=True), length=lengths)
def test_another_seed_shares_nothing(seeds: list[bytes], length: int) -> None:
    prompt = filler(length)
    a, b = (chain(seed, prompt) for seed in seeds)
    assert len(a) == len(b)
    assert not set(a.hashes) & set(b.hashes)


@given(short=lengths, more=lengths)
def test_boundaries_do_not_depend_on_the_length(short: int, more: int) -> None:
    a, b = chain(b"", bytes(short)), chain(b"", bytes(short + more))
    assert b.ends[: len(a)] == a.ends
    assert b.hashes[: len(a)] == a.hashes


def test_equal_blocks_at_different_places_hash_differently() -> None:
    assert len(set(chain(b"m", bytes(64 * 1024)).hashes)) == 88


def test_a_change_of_one_bit_changes_all_that_follows() -> None:
    before = filler(20_000)
    after = bytearray(before)
    after[5000] ^= 1
    a, b = chain(b"m", before), chain(b"m", bytes(after))
    same = [x == y for x, y in zip(a.hashes, b.hashes, strict=True)]
    assert same == [end <= 5000 for end in a.ends]


def test_the_partial_tail_is_left_out() -> None:
    assert len(chain(b"m", bytes(255))) == 0
    assert chain(b"m", bytes(256)).ends == (256,)
    assert chain(b"m", bytes(511)).ends == (256,)


def test_the_schedule_is_the_one_of_the_docstring() -> None:
    counted = {size: len(chain(b"", bytes(size))) for size in (4_000, 100_000, 1_000_000, 8_000_000)}
    assert counted == {4_000: 15, 100_000: 96, 1_000_000: 316, 8_000_000: 752}
    steps = [b - a for a, b in pairwise((0, *ENDS))]
    assert steps == sorted(steps)
    assert all((end <= 8192) == (step == 256) for end, step in zip(ENDS, steps, strict=True))


def test_a_chain_is_bounded_whatever_the_prompt() -> None:
    blocks = chain(b"", bytes(ENDS[-1] + 5_000_000))
    assert len(blocks) == MAX_BLOCKS
    assert blocks.ends == ENDS


def test_hashes_are_what_they_were() -> None:
    """Routers of different versions must agree: replicas are tied by a hash of the first blocks."""
    assert [f"{h:016x}" for h in chain(b"m", filler(600)).hashes] == ["375b6d70a1540992", "9fbbc04acbf70202"]


@given(length=lengths, limit=st.integers(0, 200))
def test_a_limit_cuts_the_chain_and_changes_nothing_before(length: int, limit: int) -> None:
    whole, cut = chain(b"m", filler(length)), chain(b"m", filler(length), limit)
    assert (cut.hashes, cut.ends) == (whole.hashes[:limit], whole.ends[:limit])
