"""Azure's LLM inference traces: when, how long a prompt, how long an answer; nothing of prefixes.

TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
"""

from __future__ import annotations

import csv
from datetime import datetime
from typing import Final

from extproc.sim.traces.base import Starts, Trace, TraceError, Turn

BLOCK: Final = 64
"""Nothing is shared, so this is only the grain in which the simulated KV cache is allotted."""


def read(lines: list[str], _starts: Starts) -> Trace:
    """Raises TraceError with the number of the line."""
    turns, first = [], None
    for number, row in enumerate(csv.DictReader(lines), 2):
        at = _time(row.get("TIMESTAMP") or "", number)
        first = at if first is None else first
        prompt, output = (_count(row.get(key), key, number) for key in ("ContextTokens", "GeneratedTokens"))
        turns.append(Turn(prompt, output, (at - first).total_seconds()))
    return Trace("azure", BLOCK, tuple(turns))


def _time(text: str, line: int) -> datetime:
    try:
        return datetime.fromisoformat(text[:26])  # the files have a seventh digit, which the standard library refuses
    except ValueError:
        raise TraceError(f"{line}: TIMESTAMP {text!r} is no date and time") from None


def _count(text: str | None, key: str, line: int) -> int:
    try:
        return max(int(text or ""), 1)
    except ValueError:
        raise TraceError(f"{line}: {key} {text!r} is no whole number") from None
