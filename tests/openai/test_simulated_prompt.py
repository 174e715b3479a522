"""Prompts in the tokens of a simulated replica."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extproc.openai import simulated_prompt
from extproc.sim import text

USER = {"role": "user", "content": "Hello there"}


def test_a_next_turn_begins_with_the_prompt_and_the_answer_of_the_last() -> None:
    first = simulated_prompt.chat_prompt([USER])
    said = text.answer(7, 33)
    reply = {"role": "assistant", "content": said.decode()}
    second = simulated_prompt.chat_prompt([USER, reply, {"role": "user", "content": "Go on"}])
    assert second.startswith(first + said)


def test_tools_come_before_messages() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert b"look" in simulated_prompt.chat_prompt([USER], tools)
    assert simulated_prompt.chat_prompt([USER], tools).endswith(simulated_prompt.chat_prompt([USER]))


@given(st.lists(st.text(), max_size=5))
def test_pieces_become_whole_tokens(pieces: list[str]) -> None:
    assert len(simulated_prompt.tokenized(pieces)) % simulated_prompt.TOKEN_BYTES == 0


def test_parts_of_a_message_are_its_text_and_an_image_has_one_size() -> None:
    def prompt(*parts: object) -> bytes:
        return simulated_prompt.chat_prompt([{"role": "user", "content": list(parts)}])

    assert prompt({"type": "text", "text": "Hello there"}) == simulated_prompt.chat_prompt([USER])
    small, large = ({"type": "image_url", "image_url": {"url": "data:" + "x" * n}} for n in (10, 100_000))
    assert len(prompt(small)) == len(prompt(large))
    assert prompt(small) != prompt(large)


def test_token_ids_are_tokens() -> None:
    assert len(simulated_prompt.from_token_ids([1, 2, 3])) == 12
    assert simulated_prompt.from_token_ids([1, 2]) != simulated_prompt.from_token_ids([2, 1])
