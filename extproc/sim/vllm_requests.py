"""Request bodies of the OpenAI APIs -> what the engine shall generate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from extproc.openai import simulated_prompt
from extproc.sim import vllm_errors

COMPLETIONS_DEFAULT: Final = 16
"""Output tokens of /v1/completions when the client sets no limit; the other APIs go to the end of the context."""

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One request, whatever its API."""

    model: str
    """Empty where the client named none."""
    prompts: tuple[bytes, ...]
    """In tokens of 4 bytes."""
    samples: int = 1
    """Sequences for each prompt."""
    max_tokens: int | None = None
    fixed_length: bool = False
    """Generate exactly `max_tokens`."""
    salt: str = ""
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


Reader = Callable[[Body], Job]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server checks before the engine sees anything."""

    models: tuple[str, ...]
    """Base models and adapters; the first is the default."""
    max_model_len: int


def read(raw: bytes, reader: Reader, limits: Limits) -> Job:
    """Raises ApiError as vLLM would, in its order: JSON, fields, model, values."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = _strictly(raw)
    if not isinstance(body, dict):
        raise vllm_errors.wrong_type("")
    job = reader(body)
    if not job.model:
        job = replace(job, model=limits.models[0])
    if job.model not in limits.models:
        raise vllm_errors.unknown_model(job.model, limits.models)
    _check_length(job, limits.max_model_len)
    return job


def _strictly(raw: bytes) -> Any:
    """Python's own parser, for its position and wording."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError as e:
        raise vllm_errors.invalid_json(e) from None
    except UnicodeDecodeError:
        raise vllm_errors.wrong_type("") from None


def _check_length(job: Job, max_model_len: int) -> None:
    wanted = job.max_tokens
    if wanted is not None and wanted < 1:
        raise vllm_errors.bad_value(f"max_tokens must be at least 1, got {wanted}.", "max_tokens", wanted)
    if wanted is not None and wanted > max_model_len:
        reason = f"max_tokens={wanted} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens."
        raise vllm_errors.bad_value(reason, "max_tokens", wanted)
    if any(len(prompt) // simulated_prompt.TOKEN_BYTES >= max_model_len for prompt in job.prompts):
        raise vllm_errors.prompt_too_long(max_model_len)


def chat(body: Body) -> Job:
    """/v1/chat/completions."""
    messages = body.get("messages")
    if messages is None:
        raise vllm_errors.missing("messages", body)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise vllm_errors.wrong_type("messages")
    limit = _integer(body, "max_completion_tokens")
    prompt = simulated_prompt.chat_prompt(messages, body.get("tools"))
    return _job(body, (prompt,), _integer(body, "max_tokens") if limit is None else limit)


def completions(body: Body) -> Job:
    """/v1/completions."""
    limit = _integer(body, "max_tokens")
    return _job(body, _prompts(body, "prompt"), COMPLETIONS_DEFAULT if limit is None else limit)


def responses(body: Body) -> Job:
    """/v1/responses."""
    given = body.get("input")
    if given is None:
        raise vllm_errors.missing("input", body)
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise vllm_errors.wrong_type("input")
    if instructions := body.get("instructions"):
        messages = [{"role": "system", "content": instructions}, *messages]
    return _job(body, (simulated_prompt.chat_prompt(messages, body.get("tools")),), _integer(body, "max_output_tokens"))


def embeddings(body: Body) -> Job:
    """/v1/embeddings: no output but one step."""
    return Job(model=str(body.get("model") or ""), prompts=_prompts(body, "input"), max_tokens=1, fixed_length=True)


def _job(body: Body, prompts: tuple[bytes, ...], max_tokens: int | None) -> Job:
    options = body.get("stream_options") or {}
    exact = bool(body.get("ignore_eos")) or bool(body.get("min_tokens"))
    return Job(
        model=str(body.get("model") or ""),
        prompts=prompts,
        samples=max(1, _integer(body, "n") or 1),
        max_tokens=max_tokens,
        fixed_length=exact and max_tokens is not None,
        salt=str(body.get("cache_salt") or ""),
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
    )


def _prompts(body: Body, field: str) -> tuple[bytes, ...]:
    """A string, a list of strings, token ids, or a list of lists of token ids."""
    given = body.get(field)
    if given is None:
        raise vllm_errors.missing(field, body)
    several = given if isinstance(given, list) and given and not _is_ids(given) else [given]
    return tuple(_prompt(one, field) for one in several)


def _prompt(given: Any, field: str) -> bytes:
    tokens = b""
    if isinstance(given, str):
        tokens = simulated_prompt.tokenized([given])
    elif isinstance(given, list) and _is_ids(given):
        tokens = simulated_prompt.from_token_ids(given)
    if not tokens:
        raise vllm_errors.wrong_type(field)
    return tokens


def _is_ids(given: Sequence[Any]) -> bool:
    return bool(given) and all(isinstance(i, int) for i in given)


def _integer(body: Body, field: str) -> int | None:
    value = body.get(field)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise vllm_errors.wrong_type(field)
    return value
