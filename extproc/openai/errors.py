"""Errors as an OpenAI client expects them: `{"error": {"message", "type", "param", "code"}}`.

Types, params and texts are those of vLLM 0.32 where it has the case, so that a client cannot tell who refused. Texts
carry numbers, field names and, bounded, model names: never a piece of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import orjson

from extproc.core.record import record
from extproc.core.types import Refusal, Reject
from extproc.openai.ratelimit import allowance_headers

MAX_NAME = 128
"""Characters of a model name that are repeated to the client."""
MAX_ALIASES = 20
"""Model names listed in one error."""

UNAVAILABLE = "Service Unavailable"
LIMITED = "rate_limit_exceeded"
"""OpenAI's code where a client has used up its limit; the type then says of what."""
CONTENTION = "rate_limit_error"
"""OpenAI's type for 429; vLLM 0.32 has no answer of that status."""


@record
class BadRequest:
    """A request that no replica would accept."""

    message: str
    type: str = "BadRequestError"
    param: str | None = None
    status: int = 400


NAME_NOT_FOUND = BadRequest("The model's name could not be replaced in the body", "Bad Request", "model")


@record
class HttpError:
    """A complete response, ready to be sent instead of routing."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...]


@record
class _Answer:
    """How one refusal looks to the client."""

    status: int
    type: str
    message: Callable[[Reject], str]
    param: str | None = None
    code: str | None = None
    """What stands under `code`; None for the status, as vLLM has it."""


def _of_limit(text: str) -> Callable[[Reject], str]:
    """`text` with the limit, where it is known."""
    return lambda reject: text.format(limit="" if reject.limit is None else f" of {reject.limit}")


def _unknown_model(reject: Reject) -> str:
    missing = f"The model `{printable(reject.model or '')}` does not exist."
    if not reject.known_models:
        return missing
    names = ", ".join(printable(name) for name in reject.known_models[:MAX_ALIASES])
    more = len(reject.known_models) - MAX_ALIASES
    return f"{missing} Valid aliases: {names}{f' and {more} more' if more > 0 else ''}."


def _no_access(reject: Reject) -> str:
    """Whether it does not exist, or not for this client, is not told. Without a model it is a path that is not read."""
    what = "What you ask for" if reject.model is None else f"The model `{printable(reject.model)}`"
    missing = f"{what} does not exist or you do not have access to it."
    names = ", ".join(printable(name) for name in reject.known_models[:MAX_ALIASES])
    return f"{missing} Available: {names}." if names else missing


ANSWERS: Mapping[Refusal, _Answer] = {
    Refusal.UNKNOWN_MODEL: _Answer(404, "NotFoundError", _unknown_model, "model"),
    Refusal.MODEL_NOT_FOUND: _Answer(404, "NotFoundError", _no_access, "model", "model_not_found"),
    Refusal.BUDGET: _Answer(
        429, "insufficient_quota", lambda _: "The budget for this model is used up. Please try again later."
    ),
    Refusal.NO_REPLICAS: _Answer(
        503, UNAVAILABLE, lambda _: "No replica is available to serve this request. Please try again later."
    ),
    Refusal.SUBSET_EMPTY: _Answer(
        503,
        UNAVAILABLE,
        lambda _: "None of the endpoints allowed for this request is available. Please try again later.",
    ),
    Refusal.ABSENT: _Answer(
        503, UNAVAILABLE, lambda _: "No replica could be reached to serve this request. Please try again later."
    ),
    Refusal.STOPPING: _Answer(503, UNAVAILABLE, lambda _: "The server is shutting down. Please try again."),
    Refusal.OVERLOADED: _Answer(
        503, UNAVAILABLE, lambda _: "The server has too many requests in progress. Please try again later."
    ),
    Refusal.QUEUE_FULL: _Answer(
        429, CONTENTION, lambda _: "Too many requests are waiting for this model. Please try again later."
    ),
    Refusal.DISPLACED: _Answer(
        429, CONTENTION, lambda _: "Requests of higher priority took the place of this one. Please try again later."
    ),
    Refusal.DEADLINE: _Answer(
        429, CONTENTION, lambda _: "This request could not be started in time. Please try again later."
    ),
    Refusal.SLO: _Answer(
        429, CONTENTION, lambda _: "The first token cannot come within the time asked for. Please try again later."
    ),
    Refusal.RATE_LIMITED: _Answer(
        429,
        "requests",
        _of_limit("Rate limit{limit} requests per minute reached. Please try again later."),
        code=LIMITED,
    ),
    Refusal.TOKENS_LIMITED: _Answer(
        429, "tokens", _of_limit("Rate limit{limit} tokens per minute reached. Please try again later."), code=LIMITED
    ),
    Refusal.CONCURRENCY: _Answer(
        429, "requests", _of_limit("Limit{limit} requests at one time reached. Please try again later."), code=LIMITED
    ),
    Refusal.PROMPT_TOO_LONG: _Answer(
        400,
        "BadRequestError",
        _of_limit("The prompt is longer than your limit{limit} tokens. Please reduce its length."),
        code="context_length_exceeded",
    ),
    Refusal.LIMITS_UNKNOWN: _Answer(
        503, UNAVAILABLE, lambda _: "Your rate limit cannot be checked at this time. Please try again later."
    ),
}
"""The one place where a refusal gets its status: 429 for contention, which the client can outwait, 503 for absence."""


def of_bad_request(bad: BadRequest) -> HttpError:
    """The response for a request that could not be read."""
    return _error(bad.status, bad.message, bad.type, bad.param)


def of_refusal(reject: Reject) -> HttpError:
    """The response for a request that the core does not route.

    `retry_after_s` of the refusal, or one second, goes into Retry-After of 429 and 503, rounded up to whole seconds (RFC 9110, 10.2.3), at least one:
    zero would invite every client back at once.
    """
    answer = ANSWERS[reject.refusal]
    retry_after_s = 1.0 if reject.retry_after_s is None else reject.retry_after_s
    # Less a microsecond: what comes back in 6 s shall not be 7 for a rounding error.
    retry_after = str(max(1, math.ceil(retry_after_s - 1e-6)))
    waits = (("retry-after", retry_after),) if answer.status in (429, 503) else ()
    headers = (*waits, *allowance_headers(reject.allowance))
    return _error(answer.status, answer.message(reject), answer.type, answer.param, headers, answer.code)


def unauthorized(presented: bool) -> HttpError:
    """The response to a client that is not known, in OpenAI's words; `presented`: it gave a key, which is not repeated."""
    text = "Incorrect API key provided." if presented else "You did not provide an API key."
    return _error(401, text, "invalid_request_error", None, (("www-authenticate", "Bearer"),), "invalid_api_key")


def not_renamed() -> HttpError:
    """The response where a model goes by another name at its replica, and the proxy does not let the body be changed."""
    text = "The proxy in front does not allow the model's name to be changed in requests."
    return _error(500, text, "InternalServerError", "model")


def no_way_out() -> HttpError:
    """The response where a model is with a provider, and the proxy leads to none."""
    return _error(500, "The proxy in front has no way to the provider of this model.", "InternalServerError", "model")


def internal() -> HttpError:
    """The response where we failed and the request must not go on all the same."""
    return _error(500, "The request could not be handled.", "InternalServerError", None)


def too_large(limit_bytes: int) -> HttpError:
    """The response for a body above the limit."""
    return _error(413, f"The request body is larger than {limit_bytes} bytes.", "Request Entity Too Large", None)


def printable(name: str) -> str:
    """A name that a client sent, safe to repeat: bounded, and nothing that breaks a log line or the quotes around it."""
    shown = "".join(c if c.isprintable() and c != "`" else "?" for c in name[:MAX_NAME])
    return shown if len(name) <= MAX_NAME else shown + "..."


def _error(
    status: int,
    message: str,
    kind: str,
    param: str | None,
    headers: tuple[tuple[str, str], ...] = (),
    code: str | None = None,
) -> HttpError:
    body = orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code or status}})
    return HttpError(status, body, (("content-type", "application/json"), *headers))
