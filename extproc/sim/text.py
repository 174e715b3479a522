"""Tokens, block hashes and generated text of a simulated replica, all of them functions of the request alone.

One token is 4 bytes. As with a real tokenizer the marks of the chat template are tokens of their own, so each piece of
the prompt starts on a token: the next turn of a conversation, which repeats the generated answer, tokenizes to the same
tokens and hits the blocks in which that answer was generated.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import xxhash

TOKEN_BYTES: Final = 4
MEDIA_TOKENS: Final = 1024
"""An image or sound of any size."""


def tokenized(pieces: Iterable[str]) -> bytes:
    """The pieces as whole tokens: UTF-8, each filled up to a multiple of 4 bytes."""
    return b"".join(_filled(piece.encode("utf-8", "surrogatepass")) for piece in pieces)


def _filled(raw: bytes) -> bytes:
    return raw + b"\0" * (-len(raw) % TOKEN_BYTES)


def from_token_ids(ids: Sequence[int]) -> bytes:
    """Token ids that the client sent: 4 bytes each."""
    return b"".join((i & 0xFFFFFFFF).to_bytes(TOKEN_BYTES, "little") for i in ids)


def chat_prompt(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> bytes:
    """Tools, messages and the opening of the answer in the ChatML form of many open models."""
    pieces = ["<|im_start|>", "tools\n", json.dumps(tools), "<|im_end|>\n"] if tools else []
    for message in messages:
        pieces += "<|im_start|>", f"{message.get('role', 'user')}\n", _content(message), "<|im_end|>\n"
    return tokenized([*pieces, "<|im_start|>", "assistant\n"])


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, its media by their hash, its tool calls as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else [content]
    return "".join(_part(part) for part in parts) + (json.dumps(calls) if calls else "")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(text := part.get("text"), str):
        return text
    return (
        "" if part is None else xxhash.xxh3_64_hexdigest(json.dumps(part).encode()) * (MEDIA_TOKENS * TOKEN_BYTES // 16)
    )


def block_hashes(tokens: bytes, block_size: int, model: str, salt: str) -> list[int]:
    """Chained hashes of the full blocks; prompts of another model, adapter or salt never match."""
    width = block_size * TOKEN_BYTES
    chained = xxhash.xxh3_64_intdigest(f"{model}\0{salt}".encode())
    digest, hashes = xxhash.xxh3_64_intdigest, []
    for start in range(0, len(tokens) - width + 1, width):
        chained = digest(tokens[start : start + width], chained)
        hashes.append(chained)
    return hashes


# --- what the model says ----------------------------------------------------------------------------------------------


def _vocabulary() -> bytes:
    """4,096 tokens of a space and three letters: nothing that JSON would escape."""
    letters = random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=3 * 4096)
    return "".join(" " + "".join(letters[i : i + 3]) for i in range(0, len(letters), 3)).encode()


_TEXT: Final = _vocabulary()


@dataclass(frozen=True, slots=True)
class OutputLength:
    """Log-normal lengths of answers in tokens."""

    mean: float = 200.0
    sigma: float = 0.8
    """Of the logarithm: 0.8 puts the 95th percentile at 2.7 times the mean."""

    def draw(self, seed: int, limit: int) -> int:
        """The length for a prompt, at least 1; the same for the same seed, whoever generates it."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(limit, round(random.Random(seed).lognormvariate(mu, self.sigma))))


def prompt_seed(prompt: bytes) -> int:
    """What the length and the text of the answer depend on."""
    return xxhash.xxh3_64_intdigest(prompt)


def answer(seed: int, tokens: int) -> bytes:
    """The generated text, 4 bytes a token."""
    start = seed % (len(_TEXT) // TOKEN_BYTES) * TOKEN_BYTES
    wanted = tokens * TOKEN_BYTES
    repeats = (start + wanted) // len(_TEXT) + 1
    return (_TEXT * repeats)[start : start + wanted]
