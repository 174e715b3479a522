"""Coding-agent sessions: a turn starts when the one before has been answered and the tools or the user are done.

    {"session": "trace_0001", "depth": 0, "t": 19.0, "in": 72762, "out": 296, "think": 12.0, "api": 9.19, "h": [[1, 1136]]}

`h` has runs of 64-token block ids, local to the session, so nothing is shared between sessions. `t` is seconds since the
session, or the sub-agent, began; `api` how long the recorded answer took; `think` the pause before the turn. A line may also have
a `priority`.

Lines of depth above 0 that follow a turn are a sub-agent that this turn started. It runs by itself, turn after turn,
from the end of that turn on. The turn after them then
 1. waits for the sub-agent, and for what was left of the pause then, if the recorded sub-agent was done within the pause;
 2. does not wait for it otherwise: it worked in the background.
So each turn waits for just one other, and a fleet that is slower than the recorded one stretches the whole session.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Final

from extproc.sim.traces.base import Run, Starts, Trace, TraceError, Turn, head, joined
from extproc.sim.traces.rows import number_of, objects, optional

BLOCK: Final = 64
_IDS_PER_SESSION: Final = 1 << 32

_SLACK_S: Final = 1.0
"""Recorded times are whole seconds."""


@dataclass(slots=True)
class _Line:
    """One line, read."""

    depth: int
    at_s: float
    think_s: float | None
    answer_s: float
    prompt_tokens: int
    output_tokens: int
    runs: tuple[Run, ...]
    priority: int


@dataclass(slots=True)
class _Lane:
    """Turns that follow each other: a session, or a sub-agent in it."""

    last: int | None = None
    """Position of its last turn."""
    spawned: tuple[int, float] | None = None
    """Last turn of a sub-agent that was started since, and how long it took when recorded."""
    recorded_end_s: float = 0.0


@dataclass(slots=True)
class _Reading:
    max_pause_s: float = math.inf
    turns: list[Turn] = field(default_factory=list)

    def session(self, name: str, base: int, starts_s: float, lines: list[_Line]) -> None:
        """Add the turns of one session."""
        main = _Lane()
        for sub, group in groupby(lines, lambda line: line.depth > 0):
            if sub:
                self._sub_agents(name, base, starts_s, list(group), main)
            else:
                for line in group:
                    self._turn(name, base, starts_s, line, main)

    def _sub_agents(self, name: str, base: int, starts_s: float, lines: list[_Line], main: _Lane) -> None:
        """Each begins where the recorded time goes back to the start."""
        lane = _Lane(main.last)
        for i, line in enumerate(lines):
            if i and line.at_s < lines[i - 1].at_s:
                lane = _Lane(main.last)
            self._turn(name, base, starts_s, line, lane, first_of_sub=lane.last == main.last)
            took_s = line.at_s + line.answer_s
            if lane.last is not None and (main.spawned is None or took_s > main.spawned[1]):
                main.spawned = lane.last, took_s

    def _turn(
        self, name: str, base: int, starts_s: float, line: _Line, lane: _Lane, first_of_sub: bool = False
    ) -> None:
        pause_s = line.think_s
        if pause_s is None:
            pause_s = max(line.at_s - lane.recorded_end_s, 0.0) if lane.last is not None else 0.0
        after, delay_s = lane.last, starts_s if lane.last is None else 0.0 if first_of_sub else pause_s
        if lane.spawned is not None and lane.spawned[1] <= pause_s + _SLACK_S:
            after, delay_s = lane.spawned[0], max(pause_s - lane.spawned[1], 0.0)
        lane.spawned = None
        if after is not None:
            delay_s = min(delay_s, self.max_pause_s)
        runs = tuple((base + start, length) for start, length in line.runs)
        self.turns.append(
            Turn(line.prompt_tokens, line.output_tokens, delay_s, after, runs, session=name, priority=line.priority)
        )
        lane.last, lane.recorded_end_s = len(self.turns) - 1, line.at_s + line.answer_s


def read(lines: list[str], starts: Starts) -> Trace:
    """Sessions in the order of the file, laid over each other as `starts` says. Raises TraceError."""
    rows = ((str(row.get("session")), _line(row, number)) for number, row in objects(lines))
    reading = _Reading(math.inf if starts.max_pause_s is None else starts.max_pause_s)
    sessions = groupby(rows, lambda row: row[0])
    timed = zip(islice(sessions, starts.sessions), starts.times(), strict=False)
    for number, ((name, group), at) in enumerate(timed):
        reading.session(name, number * _IDS_PER_SESSION, at, [line for _, line in group])
    return Trace("agentic", BLOCK, tuple(reading.turns))


def _line(row: Mapping[str, Any], line: int) -> _Line:
    prompt = max(int(number_of(row, "in", line)), 1)
    runs = row.get("h", [])
    if not isinstance(runs, list) or not all(_is_run(run) for run in runs):
        raise TraceError(f"{line}: 'h' is no list of [start, length]")
    return _Line(
        depth=int(number_of(row, "depth", line)),
        at_s=number_of(row, "t", line),
        think_s=optional(row, "think"),
        answer_s=optional(row, "api") or 0.0,
        prompt_tokens=prompt,
        output_tokens=max(int(number_of(row, "out", line)), 1),
        runs=joined(head(((start, length) for start, length in runs), prompt // BLOCK)),
        priority=int(optional(row, "priority") or 0),
    )


def _is_run(run: Any) -> bool:
    return isinstance(run, list) and len(run) == 2 and all(isinstance(n, int) and 0 <= n < 1 << 31 for n in run)
