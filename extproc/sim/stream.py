"""A streamed chat completion as a client reads it, at little cost: bytes are kept as they come and looked at once at the end.

Decoding the JSON of each chunk would cost the load generator more than the proxy under test spends on it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_CONTENT = re.compile(rb'"content":\s*"((?:[^"\\]|\\.)+)"')
"""A delta that carries text. The first chunk of a vLLM stream carries a role and an empty text, and does not count."""
_USAGE = re.compile(rb'^data:\s*(\{.*"usage":\s*\{.*\})\s*$', re.MULTILINE)
_ERROR = re.compile(rb'^data:\s*\{"error":(.*)\}\s*$', re.MULTILINE)
_ABORTED = re.compile(rb'"finish_reason":\s*"abort"')
_DONE = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the stream said in the end."""

    text: str
    output_tokens: int
    """Chunks that carried text: engines send one per token."""
    prompt_tokens: int | None
    cached_tokens: int | None
    error: str | None
    """Why it is not a whole answer though the status was 200; None for a whole one."""


class Stream:
    """Collects one response body."""

    __slots__ = ("_chunks", "first_at")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self.first_at: float | None = None
        """When the first text came; None before."""

    def feed(self, chunk: bytes, now: float) -> None:
        self._chunks.append(chunk)
        if self.first_at is None and _CONTENT.search(b"".join(self._chunks)):
            self.first_at = now

    def answer(self) -> Answer:
        """Read what was collected; the body is over, or broke off."""
        body = b"".join(self._chunks)
        pieces = _CONTENT.findall(body)
        usage = _usage(body)
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            text=json.loads(b'"' + b"".join(pieces) + b'"'),
            output_tokens=len(pieces),
            prompt_tokens=usage.get("prompt_tokens"),
            cached_tokens=details.get("cached_tokens"),
            error=_error(body),
        )


def _usage(body: bytes) -> dict[str, Any]:
    found = _USAGE.findall(body)
    return json.loads(found[-1])["usage"] if found else {}


def _error(body: bytes) -> str | None:
    """Under status 200 vLLM ends a stream in three ways that are no answer: an error event, an abort, a broken connection."""
    if found := _ERROR.search(body):
        return f"error event: {found[1][:200].decode(errors='replace').strip()}"
    if _ABORTED.search(body):
        return "aborted by the engine"
    return None if _DONE.search(body) else "broke off before [DONE]"
