"""Responses of a real vLLM 0.32, as curl wrote them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "fixtures" / "vllm-0.32"


def body(name: str) -> str:
    """What follows the headers."""
    return (FOLDER / f"{name}.txt").read_text().split("\n\n", 1)[1].strip()


def document(name: str) -> Any:
    return json.loads(body(name))


def chunks(stream: str) -> list[Any]:
    """The data lines of an event stream; `[DONE]` as it is."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def shape(value: Any) -> Any:
    """Keys in their order and types, without the values; a list is as its first item."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return type(value).__name__


def sections(name: str) -> dict[str, str]:
    """A file of several GETs: path -> body."""
    parts = (FOLDER / f"{name}.txt").read_text().split("=== GET ")[1:]
    return {part.split("\n", 1)[0]: part.split("\n\n", 1)[1].strip() for part in parts}
