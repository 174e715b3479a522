"""One field of a request body: read as leniently as vLLM does, refused in its words.

vLLM validates with pydantic in lax mode, which takes "5" and 5.0 for 5, and "true" and 1 for true. What it takes passes
here too: a client must not be refused by the proxy for what the engine accepts.
"""

from __future__ import annotations

from typing import Any

from extproc.openai.errors import BadRequest

MAX_INT = 2**63 - 1
"""Integers are clamped to 64 bits: nothing that we reckon with needs more, and floats overflow later."""

_TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "off", "f", "false", "n", "no"))


class Invalid(Exception):  # noqa: N818, it carries a verdict on the request, not a fault of ours
    """The request cannot be valid; `bad` is what to answer. Raised while one body is read, and never further."""

    def __init__(self, bad: BadRequest) -> None:
        super().__init__(bad.message)
        self.bad = bad


def invalid(kind: str, loc: str, text: str, value: Any, context: str | None = None) -> Invalid:
    """The report of one validation error as vLLM words it. Strings are not repeated, unlike there: they may be the prompt."""
    report = {"type": kind, "loc": loc, "msg": text, "input": _shown(value)}
    if context is not None:
        report["ctx"] = {"error": context}
    return Invalid(BadRequest(f"1 validation error:\n  {report}", "Bad Request", loc))


def out_of_range(field: str, text: str, value: int) -> Invalid:
    """The report, as vLLM words it, of a value of the right type that it cannot use."""
    return Invalid(BadRequest(f"{text}, got {value}. (parameter={field}, value={value})", param=field))


def missing(data: Any, loc: str) -> Invalid:
    """The report that `loc` ("body.model", say) is not there."""
    return invalid("missing", loc, "Field required", data)


def _shown(value: Any) -> Any:
    """Numbers, booleans and null as text, like vLLM; everything else by kind and size."""
    return f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, str | list | dict) else str(value)


def integer(data: dict[str, Any], key: str) -> int | None:
    """The integer under `key`; None where it is absent or null. Raises Invalid for what is no integer."""
    value = data.get(key)
    if value is None or (type(value) is int and -MAX_INT <= value <= MAX_INT):
        return value
    return max(-MAX_INT, min(_integer(value, f"body.{key}"), MAX_INT))


def _integer(value: Any, loc: str) -> int:
    if isinstance(value, str):
        return _parsed(value, loc)
    if isinstance(value, float):
        if not value.is_integer():
            raise invalid(
                "int_from_float", loc, "Input should be a valid integer, got a number with a fractional part", value
            )
        return int(value)
    if not isinstance(value, int):
        raise invalid("int_type", loc, "Input should be a valid integer", value)
    return int(value)


def _parsed(text: str, loc: str) -> int:
    """`5`, ` 5 `, `+5`, `5_000` and `5.0` all are integers to pydantic."""
    try:
        return int(text)
    except ValueError:
        whole, _, zeros = text.strip().partition(".")
        if zeros and not zeros.strip("0"):
            try:
                return int(whole)
            except ValueError:
                pass
    raise invalid(
        "int_parsing", loc, "Input should be a valid integer, unable to parse string as an integer", text
    ) from None


def boolean(data: dict[str, Any], key: str) -> bool:
    """The boolean under `key`; False where it is absent or null. Raises Invalid for what is no boolean."""
    value = data.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str):
        word = value.lower()
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
    elif isinstance(value, int | float):
        if value in (0, 1):
            return bool(value)
    else:
        raise invalid("bool_type", f"body.{key}", "Input should be a valid boolean", value)
    raise invalid("bool_parsing", f"body.{key}", "Input should be a valid boolean, unable to interpret input", value)


def string(data: dict[str, Any], key: str) -> str | None:
    """The string under `key`; None where it is absent or null. Raises Invalid for what is no string."""
    value = data.get(key)
    if value is None or isinstance(value, str):
        return value
    raise invalid("string_type", f"body.{key}", "Input should be a valid string", value)


def array(data: dict[str, Any], key: str) -> list[Any] | None:
    """The list under `key`; None where it is absent or null. Raises Invalid for what is no list."""
    value = data.get(key)
    if value is None or isinstance(value, list):
        return value
    raise invalid("list_type", f"body.{key}", "Input should be a valid list", value)


def mapping(data: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The object under `key`; None where it is absent or null. Raises Invalid for what is no object."""
    value = data.get(key)
    if value is None or isinstance(value, dict):
        return value
    raise invalid("dict_type", f"body.{key}", "Input should be a valid dictionary", value)


def objects(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of objects under `key`. Raises Invalid where it is missing, null, no list, or holds anything else."""
    if key not in data:
        raise missing(data, f"body.{key}")
    values = array(data, key)
    if values is None:
        raise invalid("list_type", f"body.{key}", "Input should be a valid list", None)
    if not set(map(type, values)) <= {dict}:
        i = next(i for i, value in enumerate(values) if not isinstance(value, dict))
        raise invalid("dict_type", f"body.{key}.{i}", "Input should be a valid dictionary", values[i])
    return values
