"""What a response says of itself while it passes: its token counts, and whether it failed under status 200. No I/O, and no waiting for its end.

For proxies whose responses go through us; inside our own Envoy `envoy/rendering/usage.lua` does the same.

    chat, completions, embeddings   "usage": {"prompt_tokens", "completion_tokens", "prompt_tokens_details": {"cached_tokens"}}
    /v1/responses                   "usage": {"input_tokens", "output_tokens", "input_tokens_details": {"cached_tokens"}}

A dead engine ends a stream with an event `data: {"error": {...}}`, one that is stopped ends all with `"finish_reason":"abort"` (vLLM 0.32).

Inside a JSON string every quote has a backslash before it, so the patterns here find keys, and never text that a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from extproc.core.types import Usage

SEAM = 48
"""Bytes of each piece that are read again with the next, so that a key cut in two is found: more than each of the patterns for a failure."""
MAX_HELD = 16_384
"""Longest unfinished usage object or event that is kept, bytes. A usage object has about 250, 1 KiB with per-request metrics."""
HEAD = 512
"""Bytes within which a response shows what it is."""
MAX_COUNT = 2**53

_KEY = b'"usage"'
_OBJECT = re.compile(rb'"usage"\s*:\s*\{')
_UNFINISHED = re.compile(rb'"usage"\s*(?::\s*)?\Z')
_BRACE = re.compile(rb'"(?:[^"\\]|\\.)*"|["{}]', re.DOTALL)
"""Braces, and strings, in which they do not count; a quote alone begins a string that has not ended."""

_ERROR_EVENT = re.compile(rb'data:\s*\{"error"\s*:\s*[{"]')
_ERROR_BODY = re.compile(rb'\s*\{"error"\s*:\s*[{"]')
_ABORTED = re.compile(rb'"finish_reason"\s*:\s*"abort"')
_OWN = re.compile(rb'(?:data:)?\s*\{\s*"id"\s*:\s*"[^"]*"\s*,\s*"object"\s*:\s*"([^"]*)"')
"""How an answer of chat or completions begins, whose structure is the engine's alone. /v1/responses repeats what clients send, metadata and
schemas of tools, in which a client could say that a replica failed."""
_OBJECTS = frozenset({b"chat.completion", b"chat.completion.chunk", b"text_completion"})

_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
_LINE_ENDS = b"\r\n"
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_SOME_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*[^\]\s]')


class UsageReader:
    """Reads the pieces of one response, a stream of events or one JSON object."""

    __slots__ = ("_begins", "_found", "_is_stream", "_own", "_rest", "_watches", "broken")

    def __init__(self, is_stream: bool, watches: bool = True) -> None:
        """`watches`: whether it may fail, which under another status than 200 is no news."""
        self._is_stream = is_stream
        self._watches = watches
        self._begins: bytes | None = b""  # what came, until it shows what it is
        self._own = False
        self._rest = b""  # to be read again with the next piece
        self._found = b""  # the last whole usage object
        self.broken = False
        """It said that it failed."""

    def __repr__(self) -> str:
        return f"<usage reader, {len(self._rest)} B held, {self._found.decode(errors='replace') or 'nothing found'}>"

    def take(self, piece: bytes) -> None:
        """The next piece, of any size. Keeps no more of it than `MAX_HELD` bytes."""
        data = self._rest + piece
        if self._watches:
            self._watch(data, piece)
        rest = self._scan(data)
        self._rest = data[rest:] if len(data) - rest <= MAX_HELD else b""

    @property
    def usage(self) -> Usage | None:
        """By the last usage object so far: with continuous_usage_stats each event has one, and only the last is whole."""
        try:
            said = orjson.loads(self._found or b"null")
        except orjson.JSONDecodeError:
            return None
        return _usage(said) if isinstance(said, dict) else None

    def _scan(self, data: bytes) -> int:
        """Take the usage objects of `data`. Where an unfinished one begins, or could."""
        seen = 0
        while (at := data.find(_KEY, seen)) >= 0:
            if (begins := _OBJECT.match(data, at)) is not None:
                start = begins.end() - 1
                if (end := _end_of_object(data, start)) is None:
                    return at
                self._found, seen = data[start:end], end
            elif _UNFINISHED.match(data, at):
                return at
            else:
                seen = at + len(_KEY)
        return max(seen, len(data) - SEAM)

    def _watch(self, data: bytes, piece: bytes) -> None:
        """Look for signs of failure; `data` is the piece with the end of those before it."""
        if self._begins is not None:
            self._begin(self._begins + piece)
        aborted = self._own and b'bort"' in data and _ABORTED.search(data) is not None
        if aborted or (self._is_stream and b'{"error"' in data and _ERROR_EVENT.search(data) is not None):
            self.broken = True
        self._watches = not self.broken

    def _begin(self, head: bytes) -> None:
        if self._is_stream:
            at = head.find(b"data:")
            if at < 0:
                self._begins = head[-4:]  # comments that keep the connection alive
                return
            head = head[at:]
        head = head[:HEAD]
        if not self._is_stream and _ERROR_BODY.match(head):
            self.broken = True
        own = _OWN.match(head)
        self._own = own is not None and own[1] in _OBJECTS
        self._begins = head if own is None and len(head) < HEAD else None


def _end_of_object(data: bytes, start: int) -> int | None:
    """The place after the object that begins at `start`; None where it is not all there."""
    depth = 0
    for token in _BRACE.finditer(data, start):
        if (text := token[0]) == b"{":
            depth += 1
        elif text == b"}":
            depth -= 1
            if depth == 0:
                return token.end()
        elif text == b'"':
            return None
    return None


def _usage(said: Mapping[str, Any]) -> Usage | None:
    details = said.get("prompt_tokens_details") or said.get("input_tokens_details")
    usage = Usage(
        prompt_tokens=_count(said, "prompt_tokens", "input_tokens"),
        completion_tokens=_count(said, "completion_tokens", "output_tokens"),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, dict) else None,
    )
    return None if usage == Usage() else usage


def _count(said: Mapping[str, Any], *names: str) -> int | None:
    value = next((said[name] for name in names if name in said), None)
    return value if type(value) is int and 0 <= value < MAX_COUNT else None


class UsageStripper:
    """Takes the one event out of a stream that has the usage and no choices, for clients that did not ask for it.

    Every other byte goes on as it came. What is kept back is an unfinished event, which a client could not act on, and of that no more than
    `MAX_HELD` bytes.
    """

    __slots__ = ("_held", "_over", "_passing")

    def __init__(self) -> None:
        self._held = b""  # an unfinished event, or the line ends of one that is passing
        self._passing = False  # the head of the unfinished event has gone on already, so it is another
        self._over = False  # a stream has one such event; what follows is not ours

    def take(self, piece: bytes) -> bytes:
        """What goes on of the pieces so far."""
        if self._over:
            return piece
        if not self._held and not self._passing and piece.endswith(b"\n\n") and _KEY not in piece:
            return piece  # whole events
        data, at = self._held + piece, 0
        out: list[bytes] = []
        while (line := _BLANK_LINE.search(data, at)) is not None:
            event, at = data[at : line.end()], line.end()
            if not self._passing and _is_usage_event(event):
                self._over, self._held = True, b""
                before = event[: len(event) - len(event.lstrip(_LINE_ENDS))]  # of the events that went on
                return b"".join((*out, before, data[at:]))
            out.append(event)
            self._passing = False
        return b"".join((*out, self._keep(data[at:])))

    def end(self) -> bytes:
        """What was kept back: the stream ended without a blank line."""
        held, self._held = self._held, b""
        return held

    def _keep(self, rest: bytes) -> bytes:
        """Keep an unfinished event; what of it goes on all the same."""
        if not self._passing and not self._may_be(rest):
            self._passing = True
        # The line ends stay back: with the next piece they may make the blank line.
        goes = len(rest.rstrip(_LINE_ENDS)) if self._passing else 0
        self._held = rest[goes:]
        return rest[:goes]

    @staticmethod
    def _may_be(event: bytes) -> bool:
        return len(event) <= MAX_HELD and _SOME_CHOICES.search(event) is None


def _is_usage_event(event: bytes) -> bool:
    return (
        _KEY in event
        and len(event) <= MAX_HELD
        and _OBJECT.search(event) is not None
        and _NO_CHOICES.search(event) is not None
        and _SOME_CHOICES.search(event) is None
    )
