from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from extproc.sim import text

USER = {"role": "user", "content": "Hello there"}


def test_a_next_turn_begins_with_the_prompt_and_the_answer_of_the_last() -> None:
    first = text.chat_prompt([USER])
    said = text.answer(7, 33)
    reply = {"role": "assistant", "content": said.decode()}
    second = text.chat_prompt([USER, reply, {"role": "user", "content": "Go on"}])
    assert second.startswith(first + said)


def test_tools_come_before_messages() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert b"look" in text.chat_prompt([USER], tools)
    assert text.chat_prompt([USER], tools).endswith(text.chat_prompt([USER]))


@given(st.lists(st.text(), max_size=5))
def test_pieces_become_whole_tokens(pieces: list[str]) -> None:
    assert len(text.tokenized(pieces)) % text.TOKEN_BYTES == 0


def test_parts_of_a_message_are_its_text_and_an_image_has_one_size() -> None:
    def prompt(*parts: object) -> bytes:
        return text.chat_prompt([{"role": "user", "content": list(parts)}])

    assert prompt({"type": "text", "text": "Hello there"}) == text.chat_prompt([USER])
    small, large = ({"type": "image_url", "image_url": {"url": "data:" + "x" * n}} for n in (10, 100_000))
    assert len(prompt(small)) == len(prompt(large))
    assert prompt(small) != prompt(large)


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


def test_token_ids_are_tokens() -> None:
    assert len(text.from_token_ids([1, 2, 3])) == 12
    assert text.from_token_ids([1, 2]) != text.from_token_ids([2, 1])
