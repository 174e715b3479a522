"""Request bodies of the OpenAI API: bytes in, what routing needs to know out.

Only what certainly fails in vLLM 0.32 is refused here, in its words, with the first mistake found; one rule is our own:
a body must name its model, for without it neither pool nor adapter is known. Whatever is in doubt goes to the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from extproc.core.prefix.blocks import MAX_BLOCKS, chain
from extproc.core.record import record
from extproc.core.types import Api, Request
from extproc.openai import body as bodies
from extproc.openai import fields, prompt
from extproc.openai.body import Change, Span
from extproc.openai.errors import BadRequest
from extproc.openai.fields import Invalid, invalid, missing
from extproc.openai.prompt import Prompt

MAX_MODEL = 1024
"""Longest model name, characters. Names are kept in records and statistics; an engine has none that long."""
MAX_SESSION = 256
"""Longest session name that is kept, characters; a longer one is no session."""
MAX_SAMPLES = 16384
"""vLLM's own bound on `n` (VLLM_MAX_N_SEQUENCES); without it one bad request would look like load for ever."""
DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions where the client gives none, as in OpenAI's API and vLLM."""

_APIS = {
    "/v1/chat/completions": Api.CHAT,
    "/v1/completions": Api.COMPLETIONS,
    "/v1/responses": Api.RESPONSES,
    "/v1/embeddings": Api.EMBEDDINGS,
}
_USAGE_APIS = (Api.CHAT, Api.COMPLETIONS)
"""Where a stream tells its usage only when asked to; /v1/responses always does."""


TRANSFER_FIELDS = ("kv_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room")
"""Of vLLM's connectors and of SGLang: from where an engine fetches a KV cache."""


@record
class Parsed:
    """A request that can be routed, and what must be known to change its body."""

    request: Request
    streams_usage: bool = False
    """The client itself asked for usage in the stream."""
    has_stream_options: bool = False
    """The body has that key already, possibly null."""
    cache_salt: str | None = None
    """As the client gave it; read only where `Limits.salt` is set."""


@record
class Limits:
    """How far a body is read."""

    max_depth: int = bodies.MAX_DEPTH
    """Deepest nesting; beyond, the body is refused."""
    max_blocks: int = MAX_BLOCKS
    """Most blocks of the prompt's chain, which ends there."""
    salt: str = ""
    """Seeds the chain beside what the body says: the tenant, where prompts of two tenants must not match."""
    named: bool = True
    """Whether the model's name seeds the chain. Not where there is a catalog: what the engine calls the model is known later (`core/catalog`)."""
    words: bool = False
    """Whether words are counted."""
    transfers: bool = True
    """Whether the body may say where KV caches come from. Not where replicas bring each other theirs: a client could name any address."""


DEFAULT = Limits()
_OTHER = Parsed(Request())


def is_read(method: str, path: str) -> bool:
    """Whether the body of such a request is read: POST on one of four exact paths, whatever the query."""
    return _api(method, path) is not Api.OTHER


def read(
    method: str, path: str, body: bytes | None, content_length: int | None = None, limits: Limits = DEFAULT
) -> Parsed | BadRequest:
    """Read one request.

    `path` may carry a query. `body` is None where only its size in bytes is known, `content_length`: the request can
    then be weighed but its model is unknown. Session, tenant and priority that come in headers are not seen here.
    """
    api = _api(method, path)
    if api is Api.OTHER:
        return _OTHER
    if body is None:
        return Parsed(Request(api=api, prompt_bytes=content_length))
    try:
        return _read(api, bodies.load(body, limits.max_depth), limits)
    except Invalid as e:
        return e.bad


def usage_change(parsed: Parsed, body: bytes) -> Change | None:
    """What to change in the body to have `stream_options.include_usage` set; None where nothing is to be changed.

    None also where `stream_options` is there but cannot be found by its plain spelling; usage then stays unknown.
    """
    request = parsed.request
    if not request.stream or parsed.streams_usage or request.api not in _USAGE_APIS:
        return None
    return bodies.change_usage(body) if parsed.has_stream_options else bodies.add_usage(body)


def model_span(parsed: Parsed, body: bytes) -> Span | None:
    """Where the body names its model; None where it names none, or where that is not found."""
    return None if parsed.request.model is None else bodies.model_span(body)


def with_usage(parsed: Parsed, body: bytes) -> bytes | None:
    """The body with that change; None where nothing is to be changed."""
    change = usage_change(parsed, body)
    return None if change is None else change.apply(body)


# --- fields -----------------------------------------------------------------------------------------------------------


def _api(method: str, path: str) -> Api:
    if method != "POST":
        return Api.OTHER
    return _APIS.get(path.partition("?")[0], Api.OTHER)


def _read(api: Api, data: dict[str, Any], limits: Limits) -> Parsed:
    if not limits.transfers:
        _forbid_transfers(data)
    asked = _PROMPTS[api](data)  # first: where prompt and model are missing, vLLM tells of the prompt
    model = _model(data)
    has_options = api in _USAGE_APIS and "stream_options" in data
    request = Request(
        api=api,
        model=model,
        blocks=chain(
            prompt.seed(model if limits.named else "", _salt(api, data), limits.salt),
            asked.canonical,
            limits.max_blocks,
        ),
        prompt_bytes=asked.size,
        prompt_tokens=asked.tokens,
        prompt_words=prompt.words(asked) if limits.words else None,
        max_output_tokens=_LIMITS[api](data),
        samples=min(_samples(api, data) * asked.count, MAX_SAMPLES),
        stream=api is not Api.EMBEDDINGS and fields.boolean(data, "stream"),
        session=_session(data),
        priority=-(fields.integer(data, "priority") or 0),  # lower goes first there, higher goes first here
        tools=bool(data.get("tools") or data.get("functions")),
        media=asked.media,
    )
    salt = data.get("cache_salt") if limits.salt else None
    return Parsed(request, has_options and _asks_usage(data), has_options, salt if isinstance(salt, str) else None)


def _model(data: dict[str, Any]) -> str:
    model = fields.string(data, "model")
    if not model:
        raise missing(data, "body.model")
    if len(model) > MAX_MODEL:
        raise invalid("string_too_long", "body.model", f"String should have at most {MAX_MODEL} characters", model)
    if not model.isascii():
        model = model.encode("utf-8", "replace").decode()  # no lone surrogate may reach hashes, logs and labels
    return model


def _salt(api: Api, data: dict[str, Any]) -> str | None:
    salt = data.get("cache_salt")
    if salt is None or (isinstance(salt, str) and salt):
        return salt
    if api is Api.EMBEDDINGS:
        return None  # not checked there
    text = "Parameter 'cache_salt' must be a non-empty string if provided."
    raise Invalid(BadRequest(f"{text} (parameter=cache_salt)", param="cache_salt"))


def _forbid_transfers(data: dict[str, Any]) -> None:
    for field in TRANSFER_FIELDS:
        if data.get(field) is not None:
            text = f"{field} is set here, and not by clients; leave it out. (parameter={field})"
            raise Invalid(BadRequest(text, param=field))


def _session(data: dict[str, Any]) -> str | None:
    session = data.get("session_id")
    if not isinstance(session, str) or not 0 < len(session) <= MAX_SESSION:
        return None
    return session.encode("utf-8", "replace").decode()


def _samples(api: Api, data: dict[str, Any]) -> int:
    """`n`; for /v1/completions `best_of` too, of which the engines that still know it generate that many."""
    if api not in _USAGE_APIS:
        return 1
    n = fields.integer(data, "n")
    if n is None:
        n = 1
    if n < 1:
        raise Invalid(BadRequest(f"n must be at least 1, got {n}."))
    best_of = data.get("best_of") if api is Api.COMPLETIONS else None
    return max(n, best_of) if isinstance(best_of, int) else n


def _asks_usage(data: dict[str, Any]) -> bool:
    options = fields.mapping(data, "stream_options") or {}
    try:
        return fields.boolean(options, "include_usage")
    except Invalid:
        return True  # not ours to mend: the engine will refuse it


# --- output limits, by API --------------------------------------------------------------------------------------------


def _positive(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise fields.out_of_range("max_tokens", "max_tokens must be at least 1", limit)
    return limit


def _chat_limit(data: dict[str, Any]) -> int | None:
    old = fields.integer(data, "max_tokens")
    new = fields.integer(data, "max_completion_tokens")
    return _positive(old if new is None else new)


def _completions_limit(data: dict[str, Any]) -> int | None:
    limit = fields.integer(data, "max_tokens")
    if limit == 0 and data.get("echo"):
        return 0  # log-probabilities of the prompt alone: the engine allows it
    return DEFAULT_COMPLETION_TOKENS if limit is None else _positive(limit)


_LIMITS: dict[Api, Callable[[dict[str, Any]], int | None]] = {
    Api.CHAT: _chat_limit,
    Api.COMPLETIONS: _completions_limit,
    Api.RESPONSES: lambda data: _positive(fields.integer(data, "max_output_tokens")),
    Api.EMBEDDINGS: lambda _: 0,
}


# --- prompts, by API --------------------------------------------------------------------------------------------------


def _chat(data: dict[str, Any]) -> Prompt:
    return prompt.of_chat(fields.objects(data, "messages"), fields.array(data, "tools"))


def _completions(data: dict[str, Any]) -> Prompt:
    embeds = data.get("prompt_embeds")
    if data.get("prompt") in (None, "") and embeds not in (None, []):
        return prompt.of_embeds(embeds)
    if data.get("prompt") in (None, ""):
        text = "Either prompt or prompt_embeds must be provided and non-empty."
        raise Invalid(BadRequest(f"{text} (parameter=prompt)", param="prompt"))
    return prompt.of_input(_input(data, "prompt"))


def _responses(data: dict[str, Any]) -> Prompt:
    given = data.get("input")
    items = given if isinstance(given, str) else fields.objects(data, "input")
    return prompt.of_responses(fields.string(data, "instructions"), items, fields.array(data, "tools"))


def _embeddings(data: dict[str, Any]) -> Prompt:
    """`input`, or vLLM's own `messages`."""
    if data.get("input") is None and "messages" in data:
        return _chat(data)
    if "input" not in data:
        raise missing(data, "body.input")
    return prompt.of_input(_input(data, "input"))


def _input(data: dict[str, Any], key: str) -> str | list[Any]:
    value = data[key]
    if isinstance(value, str | list):
        return value
    raise invalid("string_type", f"body.{key}.str", "Input should be a valid string", value)


_PROMPTS: dict[Api, Callable[[dict[str, Any]], Prompt]] = {
    Api.CHAT: _chat,
    Api.COMPLETIONS: _completions,
    Api.RESPONSES: _responses,
    Api.EMBEDDINGS: _embeddings,
}
