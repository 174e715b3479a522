"""Lines of a file to values, with the number of the line in every complaint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from extproc.sim.traces.base import TraceError


def objects(lines: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and JSON object of each line that is not blank. Raises TraceError."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise TraceError(f"{number}: not JSON: {e}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{number}: not a JSON object; each line is one request")
        yield number, row


def number_of(row: Mapping[str, Any], key: str, line: int) -> float:
    """A number that must be there. Raises TraceError."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TraceError(f"{line}: {key!r} is {value!r}, not a number")
    return float(value)


def optional(row: Mapping[str, Any], key: str) -> float | None:
    """A number that may be missing."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
