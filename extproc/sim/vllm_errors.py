"""Refusals with the status, type and wording of vLLM 0.32."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


class ApiError(Exception):
    """A request that is answered with an error; translated into a response in one place."""

    def __init__(self, status: int, type_: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.type, self.message, self.param = status, type_, message, param

    def body(self) -> bytes:
        """As sent to the client."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.status}
        return json.dumps({"error": error}, separators=(",", ":"), ensure_ascii=False).encode()


def invalid_json(error: json.JSONDecodeError) -> ApiError:
    """The body does not parse."""
    where = f"body.{error.pos}"
    return _validation(where, f"'type': 'json_invalid', 'loc': '{where}', 'msg': 'JSON decode error', "
                              f"'input': '<dict of 0 items>', 'ctx': {{'error': '{error.msg}'}}")  # fmt: skip


def missing(field: str, body: Mapping[str, Any]) -> ApiError:
    """A field that vLLM requires is not there."""
    where = f"body.{field}"
    return _validation(where, f"'type': 'missing', 'loc': '{where}', 'msg': 'Field required', "
                              f"'input': '<dict of {len(body)} items>'")  # fmt: skip


def wrong_type(field: str) -> ApiError:
    """A field has a type that vLLM cannot convert."""
    where = f"body.{field}"
    return _validation(where, f"'type': 'type_error', 'loc': '{where}', 'msg': 'Input has the wrong type'")


def _validation(where: str, detail: str) -> ApiError:
    return ApiError(400, "Bad Request", f"1 validation error:\n  {{{detail}}}", where)


def unknown_model(model: str, known: Iterable[str]) -> ApiError:
    """No model and no adapter has that name."""
    text = f"The model `{model}` does not exist. Valid aliases: {', '.join(known)}."
    return ApiError(404, "NotFoundError", text, "model")


def bad_value(text: str, param: str, value: object) -> ApiError:
    """A value out of its range."""
    return ApiError(400, "BadRequestError", f"{text} (parameter={param}, value={value})", param)


def prompt_too_long(max_model_len: int) -> ApiError:
    """The prompt alone exceeds the context."""
    text = (
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains at least "
        f"{max_model_len + 1} input tokens, which exceeds this limit even without any output tokens. "
        "Please reduce the length of the input prompt."
    )
    return bad_value(text, "input_tokens", max_model_len + 1)


def failing(status: int) -> ApiError:
    """What a replica in trouble says to everything: 503 when it is full, 500 when its engine died."""
    if status == 503:
        text = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
        return ApiError(503, "Service Unavailable", text)
    if status == 500:
        text = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        return ApiError(500, "InternalServerError", text)
    return ApiError(status, "BadRequestError" if status < 500 else "InternalServerError", "The request failed.")
