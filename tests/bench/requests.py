"""The benchmark's requests: chat bodies of one size, no two alike."""

from __future__ import annotations

import json

SIZE = 4096
"""Bytes of body."""
SYSTEM = "You answer questions about one harbour, its ships and its tides. " * 24
"""Shared head of all prompts, as system prompts are."""
_NUMBER = "########"


class Bodies:
    """Bodies of SIZE bytes; every one has a number right after the shared head, so that its other blocks are new."""

    def __init__(self, *, stream_tokens: int | None = None, size: int = SIZE) -> None:
        """`stream_tokens` makes them streaming, with that many tokens."""
        self._next = 0
        self._before, self._after = _template(stream_tokens, size).split(_NUMBER.encode())

    def request(self) -> bytes:
        """The next one as HTTP/1.1, keep-alive."""
        self._next += 1
        body = b"%s%08d%s" % (self._before, self._next, self._after)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        return b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body)


def _template(stream_tokens: int | None, size: int) -> bytes:
    options = {"max_tokens": stream_tokens, "stream": True} if stream_tokens else {"max_tokens": 64}
    question = _NUMBER + " How high is the water at the north pier? "

    def body(user: str) -> bytes:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        return json.dumps({"model": "bench", "messages": messages, **options}, separators=(",", ":")).encode()

    return body(question + "x" * (size - len(body(question))))
