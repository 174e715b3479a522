"""The prompt of a request as vLLM makes it: body in, text or token ids out, to be tokenized as it is.

By vLLM 0.32: `chat_completion/protocol.py`, `renderers/chat_utils.py`, `renderers/hf.py`, `renderers/params.py`. Whatever is not
understood for certain raises CannotTokenize, for a wrong prompt would be taken for knowledge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Final

from extproc.core.record import record
from extproc.openai.chat_template import ChatTemplate, ContentFormat
from extproc.openai.tokens import CannotTokenize, Untokenized

MAX_MESSAGES: Final = 4096
"""Of one conversation, and parts of one message; further ones would keep the interpreter busy for long."""

_TEXT_PARTS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Kinds of content parts that are text, and where it stands."""
_FUNCTION: Final = ("name", "description", "parameters", "strict")
_MAY_BE_EMPTY: Final = ("text", "refusal")
_PART_KEYS: Final = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "closed",
        "data",
        "file",
        "image_embeds",
        "image_pil",
        "image_url",
        "input_audio",
        "name",
        "prompt_cache_breakpoint",
        "refusal",
        "text",
        "thinking",
        "type",
        "uuid",
        "video_embeds",
        "video_url",
    }
)
"""What content parts of some kind are known to have; it does not get to the template."""
_RESERVED: Final = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""`chat_template_kwargs` that are no variables of a template."""
_UNSET: Final = (None, "auto")
_BILLING: Final = "x-anthropic-billing-header"
"""Begins a line that vLLM drops from system messages, for it differs with each request."""


@record
class Cut:
    """How much of the prompt is kept."""

    tokens: int
    side: str | None = None
    """Which end is cut off, `left` or `right`; None as the engine's tokenizer does it, before it adds special tokens."""


@record
class Text:
    """To be tokenized."""

    text: str
    special: bool = False
    """Add what the tokenizer puts around a text, such as a token that begins it."""
    cut: Cut | None = None


@record
class Ids:
    """The client did that."""

    ids: Sequence[int]
    cut: Cut | None = None


@record
class Templates:
    """What a model brings to make text of messages."""

    of: Callable[[bool], ChatTemplate | None]
    """The template, with or without tools; None where there is none."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token` and the like, by name."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The engine's `--default-chat-template-kwargs`."""
    content_format: ContentFormat | None = None
    """None: as the template wants it."""


def of_completion(data: Mapping[str, Any]) -> Text | Ids:
    """The prompt of /v1/completions. Raises CannotTokenize."""
    if data.get("prompt_embeds") is not None:
        raise CannotTokenize(Untokenized.MEDIA)
    if data.get("suffix") or _reused(data):
        raise CannotTokenize(Untokenized.FIELD)
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Text(prompt, _flag(data, "add_special_tokens", default=True), _cut(data))
    if isinstance(prompt, list) and prompt and all(type(each) is int and each >= 0 for each in prompt):
        return Ids(prompt, _cut(data))
    raise CannotTokenize(Untokenized.PROMPTS)


def of_chat(data: Mapping[str, Any], templates: Templates) -> Text:
    """The prompt of /v1/chat/completions. Raises CannotTokenize."""
    own = data.get("chat_template_kwargs") or {}
    if data.get("chat_template") is not None or not isinstance(own, dict) or not _RESERVED.isdisjoint(own):
        raise CannotTokenize(Untokenized.TEMPLATE)
    if _reused(data):
        raise CannotTokenize(Untokenized.FIELD)
    tools = _tools(data.get("tools"))
    template = templates.of(tools is not None)
    if template is None:
        raise CannotTokenize(Untokenized.TEMPLATE)
    messages = conversation(data.get("messages"), templates.content_format or template.content_format)
    if not template.knows_developers and any(each["role"] == "developer" for each in messages):
        messages = _without_developers(messages)
    add_generation_prompt = _flag(data, "add_generation_prompt", default=True)
    continue_final = _flag(data, "continue_final_message", default=False)
    if continue_final and (add_generation_prompt or "content" not in template.source):
        raise CannotTokenize(Untokenized.REFUSED)
    values = {"documents": None, **templates.special_tokens, **templates.values, **_values(data, own)}
    values |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
    text = template.render(messages, values, continue_final)
    return Text(text, _flag(data, "add_special_tokens", default=False), _cut(data))


def reads_no_cache(data: Mapping[str, Any]) -> bool:
    """Whether the engine computes the whole prompt, whatever is cached: it is asked for its log-probabilities."""
    if data.get("prompt_logprobs") is not None:
        return True
    return bool(data.get("echo")) and data.get("logprobs") is not None and "prompt" in data


def conversation(messages: Any, content_format: ContentFormat) -> list[dict[str, Any]]:
    """Messages as a template gets them. Raises CannotTokenize."""
    if not isinstance(messages, list) or not messages:
        raise CannotTokenize(Untokenized.REFUSED)
    if len(messages) > MAX_MESSAGES:
        raise CannotTokenize(Untokenized.LARGE)
    return [_message(each, content_format) for each in messages]


# --- fields -----------------------------------------------------------------------------------------------------------


def _flag(data: Mapping[str, Any], key: str, default: bool) -> bool:
    value = data.get(key, default)
    if not isinstance(value, bool):
        raise CannotTokenize(Untokenized.FIELD)
    return value


def _cut(data: Mapping[str, Any]) -> Cut | None:
    tokens, side = data.get("truncate_prompt_tokens"), data.get("truncation_side")
    if tokens is None:
        return None
    if type(tokens) is not int or tokens < 1 or side not in (None, "left", "right"):
        raise CannotTokenize(Untokenized.FIELD)  # -1 is the model's length, which is not known here
    return Cut(tokens, side)


def _reused(data: Mapping[str, Any]) -> bool:
    """Whether the prompt is that of a request before, whose ids another engine passes on."""
    transfer = data.get("kv_transfer_params")
    return isinstance(transfer, dict) and transfer.get("prompt_token_ids") is not None


def _values(data: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the request says to the template."""
    found = {key: value for key, value in own.items() if value not in _UNSET}
    effort = data.get("reasoning_effort")
    if effort not in _UNSET:
        found["reasoning_effort"] = effort
        if "enable_thinking" not in own:
            found["enable_thinking"] = effort != "none"
    if (documents := data.get("documents")) is not None:
        found["documents"] = documents
    return found


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """As vLLM's own records write them: known keys in their order, `description` and `parameters` always."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not tools:
        raise CannotTokenize(Untokenized.REFUSED)
    return [_tool(each) for each in tools]


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise CannotTokenize(Untokenized.REFUSED)
    if tool.get("defer_loading") is not None or function.get("defer_loading") is not None:
        raise CannotTokenize(Untokenized.FIELD)
    found = {key: function.get(key) for key in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        found["strict"] = function["strict"]
    return {"type": tool.get("type", "function"), "function": found}


# --- messages ---------------------------------------------------------------------------------------------------------


def _message(message: Any, content_format: ContentFormat) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise CannotTokenize(Untokenized.REFUSED)
    parts = _parts(message.get("content"), role == "system")
    found: dict[str, Any] = {"role": role}
    if content_format is ContentFormat.STRING:
        found["content"] = "\n".join(part["text"] for part in parts if part["text"])
    elif role == "tool":
        found["content"] = _joined(parts)
    else:
        found["content"] = parts
    if role == "assistant":
        found |= _of_assistant(message)
    elif role == "tool" and "tool_call_id" in message:
        found["tool_call_id"] = message["tool_call_id"]
    for key in ("name", "task"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    if role == "developer":
        found["tools"] = _tools_of(message)
    return found


def _parts(content: Any, of_system: bool) -> list[dict[str, Any]]:
    """Each with its text, and with what no part is known to have, which is passed on as it is."""
    if content is None:
        return []
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise CannotTokenize(Untokenized.REFUSED)
    if len(content) > MAX_MESSAGES:
        raise CannotTokenize(Untokenized.LARGE)
    parts = [found for part in content if (found := _part(part)) is not None]
    return _unbilled(parts) if of_system else parts


def _part(part: Any) -> dict[str, Any] | None:
    """None where it has no text, which is passed over."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or part.get("uuid") is not None:
        raise CannotTokenize(Untokenized.MEDIA)
    text = part.get(_TEXT_PARTS[kind])
    if text is None and kind in _MAY_BE_EMPTY:
        return None
    if not isinstance(text, str):
        raise CannotTokenize(Untokenized.REFUSED)
    return {"type": "text", "text": text, **{key: value for key, value in part.items() if key not in _PART_KEYS}}


def _unbilled(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts that begin with the line go without it, and are gone where nothing follows."""
    kept = []
    for part in parts:
        text = part["text"]
        rest = text.partition("\n")[2] if text.startswith(_BILLING) else text
        if rest or rest == text:
            kept.append({**part, "text": rest})
    return kept


def _of_assistant(message: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise CannotTokenize(Untokenized.REFUSED)
    if calls:
        found["tool_calls"] = [_call(each) for each in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = reasoning
    return found


def _call(call: Any) -> dict[str, Any]:
    """With its arguments as an object, which templates want."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise CannotTokenize(Untokenized.REFUSED)
    function = {**function, "arguments": _arguments(function.get("arguments"))}
    return _ordered({**call, "function": _ordered(function, "arguments", "name")}, "id", "function", "type")


def _ordered(value: Mapping[str, Any], *first: str) -> dict[str, Any]:
    """With these keys in front: the order of vLLM's records, which shows where a template writes them as JSON."""
    return {key: value[key] for key in (*first, *value) if key in value}


def _tools_of(message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Of a developer."""
    tools = message.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(map(_is_whole, tools)):
        raise CannotTokenize(Untokenized.FIELD)
    return [
        _ordered({**each, "function": _ordered(each["function"], *_FUNCTION)}, "function", "type") for each in tools
    ]


def _is_whole(tool: Any) -> bool:
    """Whether vLLM knows it for a tool; others keep the order of their keys."""
    return isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("function"), dict)


def _arguments(given: Any) -> dict[str, Any]:
    """An empty object for whatever is none."""
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    return given if isinstance(given, dict) else {}


def _without_developers(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """They become system messages, and where there are several all of these one, in front."""
    changed = [
        {key: value for key, value in {**each, "role": "system"}.items() if key != "tools"}
        if each["role"] == "developer"
        else each
        for each in messages
    ]
    systems = [i for i, each in enumerate(changed) if each["role"] == "system"]
    if systems in ([], [0]):
        return changed
    said = [_joined(changed[i]["content"]) for i in systems]
    one = {"role": "system", "content": "\n\n".join(text for text in said if text)}
    return [one, *(each for each in changed if each["role"] != "system")]


def _joined(content: str | Sequence[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
