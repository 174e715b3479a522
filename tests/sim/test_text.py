from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from extproc.sim import text


def test_hashes_agree_up_to_the_block_that_differs() -> None:
    one, two = bytes(range(200)), bytes(range(150)) + bytes(50)
    a, b = (text.block_hashes(t, 4, "m", "") for t in (one, two))
    assert len(a) == len(b) == 200 // 16
    assert [x == y for x, y in zip(a, b, strict=True)] == [True] * 9 + [False] * 3


def test_another_model_or_salt_shares_no_hash() -> None:
    tokens = bytes(64)
    chains = [text.block_hashes(tokens, 4, m, s) for m, s in [("m", ""), ("n", ""), ("m", "x"), ("m\0x", "")]]
    hashes = [h for c in chains for h in c]
    assert len(set(hashes)) == len(hashes) == 16


def test_equal_blocks_in_a_row_have_different_hashes() -> None:
    assert len(set(text.block_hashes(bytes(640), 4, "m", ""))) == 40


@given(st.integers(0, 2**64 - 1), st.integers(1, 5000))
def test_an_answer_has_four_plain_bytes_for_each_token(seed: int, tokens: int) -> None:
    said = text.answer(seed, tokens)
    assert len(said) == 4 * tokens
    assert said.decode().replace(" ", "").isalpha()
    assert text.answer(seed, tokens + 3)[: len(said)] == said


def test_lengths_follow_the_configured_mean_and_the_limit() -> None:
    lengths = text.OutputLength(mean=300)
    drawn = [lengths.draw(seed, 100_000) for seed in range(5000)]
    assert 280 < statistics.mean(drawn) < 320
    assert min(drawn) >= 1
    assert drawn[:50] == [lengths.draw(seed, 100_000) for seed in range(50)]
    assert max(lengths.draw(seed, 20) for seed in range(50)) == 20
