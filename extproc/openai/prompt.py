"""Canonical prompt: the bytes of a prompt in the order in which the engine sees them.

Equal requests give equal bytes however their JSON is written, and a growing conversation gives bytes of which each turn
is a prefix of the next:

1. Tools come first, then messages in order: role, content, and what else the chat template reads of a message.
2. Separators stand before what they announce and depend on nothing that follows. There is no length in front, no end
   marker and no generation prompt, for each of these would differ between a turn and the next.
3. Separators are bytes that UTF-8 never uses, so no text can imitate them.
4. An image, sound or video stands as its hash, repeated to `MEDIA_BYTES`. So megabytes of base64 are not carried along,
   and the size of the canonical prompt stays a fair measure of its tokens, before and after a cached prefix.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
from xxhash import xxh3_64_digest

from extproc.core.record import record

MEDIA_BYTES = 4096
"""One image, sound or video, bytes: about a thousand tokens, between LLaVA's 576 for any image and the 1,300 or so that
Qwen2-VL takes for a megapixel. The true number depends on the model and is learned there, from usage."""
MAX_MEDIA = 256
"""Media of one prompt that are given that size; further ones are hashed alone. A body of nothing but empty image parts
would otherwise grow two hundredfold."""
MAX_PIECES = 16384
"""Pieces of one prompt that are taken one by one, some thousand messages; the rest is hashed in one. Millions of empty
messages fit into a body, and would hold everybody else up for seconds."""

_MESSAGE = b"\xff"
_CONTENT = b"\xfe"
_FIELD = b"\xfd"
_TOOLS = b"\xfc"
_MEDIA = b"\xfb"

_NO_WORD = re.compile(rb"[\xff\xfd][^\xfb-\xff]*\xfe|[\xfb-\xff]")
"""Roles and names of fields, with the separators around them; and separators."""

_ROLES = {role: _MESSAGE + role.encode() + _CONTENT for role in ("system", "developer", "user", "assistant", "tool")}
_FIELDS = ("reasoning", "reasoning_content", "tool_calls", "function_call", "name", "tool_call_id")
"""What a chat template may read of a message beside role and content."""


@record
class Prompt:
    """What one request asks the engine to prefill."""

    canonical: bytes
    """The prompt whose prefix is looked up; of several prompts in one request the first."""
    size: int
    """Bytes of all prompts of the request, canonical."""
    tokens: int | None = None
    """Tokens of all prompts, known where the client sent token ids."""
    count: int = 1
    """Prompts in the request; each runs as a sequence of its own."""
    media: bool = False
    """Something in it is no text."""


def words(prompt: Prompt) -> int | None:
    """Words of its text, as white space parts them; None for token ids, media and several prompts in one. Some 50 us for a thousand."""
    if prompt.tokens is not None or prompt.media or prompt.count > 1:
        return None
    return len(_NO_WORD.sub(b" ", prompt.canonical).split())


def seed(model: str, salt: str | None, tenant: str = "") -> bytes:
    """What a chain starts from: prompts for another model, LoRA adapter, `cache_salt` or tenant share no hash."""
    start = _utf8(model) + _FIELD + _utf8(salt or "")
    return start + _FIELD + _utf8(tenant) if tenant else start


def of_chat(messages: list[dict[str, Any]], tools: list[Any] | None = None) -> Prompt:
    """`messages` and `tools` of /v1/chat/completions."""
    out = _Writer()
    out.tools(tools)
    out.messages(messages)
    return out.prompt()


def of_responses(instructions: str | None, items: str | list[dict[str, Any]], tools: list[Any] | None = None) -> Prompt:
    """`instructions`, `input` and `tools` of /v1/responses.

    Instructions are a system message and a string is a user message, so the same conversation has the same canonical
    prompt here and under chat.
    """
    out = _Writer()
    out.tools(tools)
    if instructions is not None:
        out.message({"role": "system", "content": instructions})
    if isinstance(items, str):
        out.message({"role": "user", "content": items})
    else:
        out.messages(items)
    return out.prompt()


def of_input(value: str | list[Any]) -> Prompt:
    """`prompt` of /v1/completions, `input` of /v1/embeddings: text, token ids, or a list of either.

    Several prompts of one request go to one replica together, and usually share their head (an evaluation, a batch):
    the first stands for all in the prefix index, while sizes and tokens are summed. A list of another kind is taken as
    JSON text: the engine will say what is wrong with it.
    """
    kinds = set(map(type, value)) if isinstance(value, list) else ()
    if kinds == {str}:
        return replace(_one(value[0]), size=len(_utf8("".join(value))), count=len(value))
    if kinds == {list} and (first := _one(value[0])).tokens is not None:
        tokens = sum(map(len, value))
        return replace(first, size=4 * tokens, tokens=tokens, count=len(value))
    return _one(value)


def of_embeds(value: Any) -> Prompt:
    """`prompt_embeds` of /v1/completions: tensors, taken as one medium whatever their length."""
    out = _Writer()
    out.media(value)
    return out.prompt()


def _one(value: Any) -> Prompt:
    if isinstance(value, str):
        text = _utf8(value)
        return Prompt(text, len(text))
    ids = _packed(value) if isinstance(value, list) else None
    if ids is not None:
        return Prompt(ids, len(ids), tokens=len(value))
    text = _json(value)
    return Prompt(text, len(text))


def _packed(ids: Sequence[Any]) -> bytes | None:
    """Token ids as little-endian unsigned 32-bit numbers; None unless all fit."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        return None


class _Writer:
    """Collects the pieces of one canonical prompt."""

    __slots__ = ("_media", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._media = 0

    def prompt(self) -> Prompt:
        canonical = b"".join(self._pieces)
        return Prompt(canonical, len(canonical), media=self._media > 0)

    def tools(self, tools: list[Any] | None) -> None:
        if tools:
            self._pieces += (_TOOLS, _json(tools))

    def messages(self, messages: list[dict[str, Any]]) -> None:
        for i, message in enumerate(messages):
            if len(self._pieces) > MAX_PIECES:
                self._pieces += (_MESSAGE, _json(messages[i:]))
                return
            if "role" in message or "type" not in message:
                self.message(message)
            else:
                self.item(message)

    def message(self, message: dict[str, Any]) -> None:
        role = message.get("role")
        role = role if isinstance(role, str) else ""
        self._pieces.append(_ROLES.get(role) or _MESSAGE + _utf8(role) + _CONTENT)
        self.content(message.get("content"))
        if len(message) > 2 or "content" not in message:
            for key in _FIELDS:
                if value := message.get(key):
                    self._pieces += (_FIELD, key.encode(), _CONTENT, _text(value))

    def item(self, item: dict[str, Any]) -> None:
        """An input item of /v1/responses that is no message: a call, its output, reasoning."""
        rest = {key: value for key, value in item.items() if key not in ("content", "output")}
        self._pieces += (_MESSAGE, _FIELD, _json(rest))
        for key in ("content", "output"):
            if value := item.get(key):
                self._pieces += (_FIELD, key.encode(), _CONTENT)
                self.content(value)

    def content(self, content: Any) -> None:
        if isinstance(content, str):
            self._pieces.append(_utf8(content))
        elif isinstance(content, list):
            self._parts(content)
        elif content is not None:
            self.media(content)

    def _parts(self, parts: list[Any]) -> None:
        """Joined by line feeds, as vLLM does for templates that take text alone: one part equals a plain string."""
        for i, part in enumerate(parts):
            if len(self._pieces) > MAX_PIECES:
                self.media(parts[i:])
                return
            if i:
                self._pieces.append(b"\n")
            if (text := _part_text(part)) is not None:
                self._pieces.append(_utf8(text))
            else:
                self.media(part)

    def media(self, part: Any) -> None:
        digest = xxh3_64_digest(_json(part))
        self._media += 1
        if self._media > MAX_MEDIA:
            self._pieces += (_MEDIA, digest)
        else:
            self._pieces.append((_MEDIA + digest * (MEDIA_BYTES // len(digest)))[:MEDIA_BYTES])


def _part_text(part: Any) -> str | None:
    """Text of a content part, whatever its kind calls it; None for media and all that we do not know."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return None
    for key in ("text", "refusal", "thinking"):
        if isinstance(text := part.get(key), str):
            return text
    return None


def _text(value: Any) -> bytes:
    return _utf8(value) if isinstance(value, str) else _json(value)


def _utf8(text: str) -> bytes:
    """JSON can spell half a surrogate pair, which plain UTF-8 refuses; hashing must not fail where the engine would not."""
    return text.encode("utf-8", "surrogatepass")


def _json(value: Any) -> bytes:
    """One spelling for equal values: keys sorted, no white space."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return _json_slowly(value)


def _json_slowly(value: Any) -> bytes:
    """Lone surrogates, integers above 64 bits and nesting beyond 254 levels, all of which orjson refuses to write.

    What nests deeper than the interpreter recurses is one and the same to us: a wrong prediction, never an error.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError:
        return _MEDIA
