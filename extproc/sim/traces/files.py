"""Trace files: which format one has, and the reader for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from extproc.sim.traces import agentic, azure, mooncake
from extproc.sim.traces.base import Starts, Trace, TraceError

Reader = Callable[[list[str], Starts], Trace]

FORMATS: Final[Mapping[str, Reader]] = {"mooncake": mooncake.read, "agentic": agentic.read, "azure": azure.read}
"""Name -> reader of the file's lines."""

SOURCES: Final = (
    "public traces: github.com/kvcache-ai/Mooncake (FAST25-release, mooncake), "
    "github.com/callanjfox/kv-cache-tester (agentic sessions), github.com/Azure/AzurePublicDataset (LLM inference, azure); "
    "or make one with --generate"
)


def load(path: Path, name: str | None = None, starts: Starts | None = None) -> Trace:
    """Read a trace. `name` is its format; without, its first line tells. Raises TraceError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = list(file)
    except OSError as e:
        raise TraceError(f"{path}: {e.strerror}; {SOURCES}") from None
    reader = FORMATS[name or detected(path, lines)]
    try:
        return reader(lines, starts or Starts())
    except TraceError as e:
        raise TraceError(f"{path}:{e}") from None


def detected(path: Path, lines: list[str]) -> str:
    """The format, by the names of the fields in the first line that has any. Raises TraceError."""
    for line in islice((line for line in lines if line.strip()), 1):
        names = _names(line)
        if {"timestamp", "input_length"} <= names:
            return "mooncake"
        if {"session", "in", "out"} <= names:
            return "agentic"
        if {"contexttokens", "generatedtokens"} <= names:
            return "azure"
    known = ", ".join(FORMATS)
    raise TraceError(f"{path}: none of the known formats ({known}) by its first line; name one with --format")


def _names(line: str) -> set[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return {field.strip().lower() for field in line.split(",")}
    return set(row) if isinstance(row, dict) else set()
