"""Mooncake's traces (FAST'25): one request a line, with chained ids of its 512-token prompt blocks; starts by the clock.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, ...]}

Milliseconds. The id of the last, partial block is left out: an engine shares full blocks alone. A line may also have a `priority`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from extproc.sim.traces.base import Run, Starts, Trace, TraceError, Turn, joined
from extproc.sim.traces.rows import number_of, objects, optional

BLOCK: Final = 512


def read(lines: list[str], _starts: Starts) -> Trace:
    """Raises TraceError with the number of the line."""
    return Trace("mooncake", BLOCK, tuple(_turn(row, number) for number, row in objects(lines)))


def _turn(row: Mapping[str, Any], line: int) -> Turn:
    prompt = max(int(number_of(row, "input_length", line)), 1)
    output = max(int(number_of(row, "output_length", line)), 1)
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise TraceError(f"{line}: 'hash_ids' is no list of whole numbers")
    runs: list[Run] = [(i, 1) for i in ids[: prompt // BLOCK]]
    at_s, priority = number_of(row, "timestamp", line) / 1e3, int(optional(row, "priority") or 0)
    return Turn(prompt, output, at_s, runs=joined(runs), priority=priority)
