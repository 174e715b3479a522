"""A request body as bytes: its object, and the few changes that are made to it.

Every other byte stays as the client wrote it: to write the body anew would turn large integers into floats and drop
doubled keys.
"""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any

import orjson

from extproc.core.record import record
from extproc.openai.errors import BadRequest
from extproc.openai.fields import Invalid, invalid, missing

_STREAM_OPTIONS = re.compile(rb'"stream_options"\s*:\s*(null|\{[^{}]*\})')
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_MODEL = re.compile(rb'"model"\s*:\s*(' + _STRING + rb")", re.DOTALL)
"""A key `model` whose value is a string, at any depth. In a string its quotes would be escaped."""
_SPELLED = b"\\u006"
"""How every letter of `model` begins where it is escaped."""
_TOKEN = re.compile(rb"(" + _STRING + rb")(\s*:)?|[\[\]{}]", re.DOTALL)
"""What matters for depth: brackets, and strings, in which brackets do not count. One that a colon follows is a key."""


MAX_DEPTH = 128
"""Nesting that is taken where nobody says otherwise. vLLM's own end, near 1,000, is that of its interpreter's stack."""

ANY_DEPTH = sys.maxsize


@record
class Change:
    """One piece of a body that is replaced."""

    start: int
    end: int
    """Bytes of the body; both ends are the same where something is put in."""
    replacement: bytes

    def apply(self, body: bytes | memoryview) -> bytes:
        """The body with the change; one copy."""
        return applied(body, (self,))


Span = tuple[int, int]
"""First byte, and the first after the last."""


def applied(body: bytes | memoryview, changes: Sequence[Change]) -> bytes:
    """The body with all of them, each in terms of the body as it was; one copy. They must not overlap; those that put something in at
    the same place stand there in their order.
    """
    view, at = memoryview(body), 0
    pieces: list[bytes | memoryview] = []
    for change in sorted(changes, key=lambda each: each.start):
        pieces += (view[at : change.start], change.replacement)
        at = change.end
    return b"".join((*pieces, view[at:]))


def load(body: bytes, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The object that a body holds; of doubled keys the last. Raises Invalid, also where it nests deeper than `max_depth`."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = _load_slowly(body)
    if data is None:
        raise missing(None, "body")
    if not isinstance(data, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        raise invalid("model_attributes_type", "body", text, data)
    if body.count(b"[") + body.count(b"{") > max_depth and _nests_deeper(data, max_depth):
        text = f"There was an error parsing the body: it nests deeper than {max_depth} levels"
        raise Invalid(BadRequest(text, "Bad Request"))
    return data


def _nests_deeper(data: Any, levels: int) -> bool:
    """Level by level, for a recursion could be made to end the interpreter."""
    level = [data]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _load_slowly(body: bytes) -> Any:
    """The standard library's parser, which vLLM uses: it takes NaN, lone surrogates and a byte order mark, and its
    account of a mistake is the one that clients of vLLM know. UTF-16, which it would take too, is refused (RFC 8259).
    """
    if not body:
        raise missing(None, "body")
    try:
        return json.loads(body.decode("utf-8-sig", "surrogatepass"))
    except json.JSONDecodeError as e:
        raise invalid("json_invalid", f"body.{e.pos}", "JSON decode error", {}, context=e.msg) from None
    except (ValueError, RecursionError):
        raise Invalid(BadRequest("There was an error parsing the body", "Bad Request")) from None


def add_usage(body: bytes) -> Change:
    """Give the object of a body that lacks it the key `stream_options`; it must not be empty."""
    end = body.rindex(b"}")  # the object's own: only white space can follow it
    return Change(end, end, b',"stream_options":{"include_usage":true}')


def salt(body: bytes | memoryview, value: str) -> Change:
    """Give it `cache_salt`. Where it has that key already there are two, and readers of JSON take the last, vLLM's too."""
    end = bytes(body).rindex(b"}")
    return Change(end, end, b',"cache_salt":"' + value.encode("ascii") + b'"')


def pair(body: bytes | memoryview, host: str, port: int, room: int) -> Change:
    """Tell two engines of SGLang's that get this body where they meet: at the bootstrap server of the one that prefills, under a number
    below 2**63. Of doubled keys readers of JSON take the last, which are these.
    """
    end = bytes(body).rindex(b"}")
    text = f',"bootstrap_host":"{host}","bootstrap_port":{port},"bootstrap_room":{room}'
    return Change(end, end, text.encode("ascii"))


def rename(span: Span, model: str) -> Change:
    """Put this name in the place of the model's; `span` by `model_span`."""
    return Change(*span, json.dumps(model).encode())


def model_span(body: bytes) -> Span | None:
    """Where the value of the top-level `model` stands, of doubled keys the last, in a body that was read and names its model.

    Nearly always there is one key of that name in all of the body, and it is the one: to look for it costs less than to read the body. A
    tool's schema may have another, or the key may be escaped; then depth is counted, string by string, at five times the cost of
    reading. None is for bodies that do not read as they should.
    """
    found = [] if _SPELLED in body else list(islice(_MODEL.finditer(body), 2))
    return found[0].span(1) if len(found) == 1 else _top_level(body, "model")


def _top_level(body: bytes, key: str) -> Span | None:
    """The last string value of a key of the outermost object."""
    depth, wanted, span = 0, False, None
    for token in _TOKEN.finditer(body):
        text = token[1]
        if text is None:
            depth += 1 if token[0] in b"[{" else -1
            wanted = False
        elif token[2] is not None:
            wanted = depth == 1 and json.loads(text, strict=False) == key
        elif wanted:
            span, wanted = token.span(1), False
    return span


def change_usage(body: bytes) -> Change | None:
    """Replace the value of the top-level `stream_options`; None where it is spelled so oddly that it is not found.

    A tool's schema may have a key of that name too, so each place is tried, and the one is taken after which the body
    reads as it should. Trying the last four at most bounds the cost. The body must have been read: its depth is not checked again.
    """
    data = load(body, ANY_DEPTH)
    options = dict(data.get("stream_options") or {}, include_usage=True)
    if options.get("continuous_usage_stats"):  # without effect until now; with it every chunk would carry usage
        options["continuous_usage_stats"] = False
    wanted = {**data, "stream_options": options}
    value = json.dumps(options, separators=(",", ":")).encode()
    for match in deque(_STREAM_OPTIONS.finditer(body), maxlen=4):
        change = Change(*match.span(1), value)
        if _reads_as(change.apply(body), wanted):
            return change
    return None


def _reads_as(body: bytes, wanted: dict[str, Any]) -> bool:
    try:
        return load(body, ANY_DEPTH) == wanted
    except (Invalid, RecursionError):
        return False
