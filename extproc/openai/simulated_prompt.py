"""The prompt of a request in the tokens of a simulated replica (`extproc backend`), 4 bytes each.

As with a real tokenizer the marks of the chat template are tokens of their own, so each piece of the prompt starts on a token: the next
turn of a conversation, which repeats the generated answer, tokenizes to the same tokens and hits the blocks in which that answer was
generated. Where a pool has `tokenizer: {simulated: true}` the router does the same, and knows these tokens as it would a model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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


def token_ids(tokens: bytes) -> list[int]:
    """4 bytes each, little endian."""
    return [int.from_bytes(tokens[i : i + TOKEN_BYTES], "little") for i in range(0, len(tokens), TOKEN_BYTES)]


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
