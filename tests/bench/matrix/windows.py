"""What a run replays: a window of a recorded trace, or a generated one. The seed selects which.

* Requests by the clock: as many consecutive ones, beginning at a place that the seed spreads over the file.
* Recorded sessions: whole ones from such a place on, each cut to its first turns; they begin at random (Poisson), for each was
  recorded on its own. Blocks are merged to 512 tokens, which tells less than 1 % of prompts this long apart and takes an
  eighth of the time.
* Generated: by that seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import Final

from extproc.sim.traces import Generate, Starts, Trace, Turn, generate, load
from extproc.sim.traces.base import joined

RECORDED: Final[Mapping[str, str]] = {
    "conversation": "mooncake_conversation.jsonl",
    "agentic": "agentic_sessions.jsonl",
    "azure": "azure_2023_conv.csv",
}
"""Trace -> its file in the folder of `--traces`."""

GENERATED: Final[Mapping[str, Generate]] = {
    "chat": Generate(
        turns=3, think_s=2, system_tokens=3000, user_tokens=3000, output_tokens=150, burst_share=0, block_size=128
    ),
    "siblings": Generate(turns=1.3, think_s=2, user_tokens=2000, burst_share=0.5, siblings=12, block_size=128),
    "hot": Generate(
        turns=1.2, think_s=2, tenants=1, groups=1, system_tokens=4000, user_tokens=2000, burst_share=0, block_size=128
    ),
    "unshared": Generate(turns=1, system_tokens=0, user_tokens=3000, burst_share=0, block_size=128),
}
"""Several turns over system prompts of popular and unpopular tenants; bursts that begin alike; one system prompt for all; nothing
shared at all."""

MAX_TOKENS: Final = 131_072
"""Llama 3.1's context: a session ends before a turn that would pass it."""
MAX_PAUSE_S: Final = 10.0
"""Longer pauses between recorded turns are cut: a window is a few minutes, and users come back the next day."""
BLOCK: Final = 512
"""Tokens, to which the blocks of recorded sessions are merged."""
_GOLDEN: Final = 0.6180339887


@dataclass(frozen=True, slots=True)
class Source:
    """Where the windows of one trace come from, and how large they are."""

    name: str
    requests: int
    """Of one window."""
    turns: int
    """A session is cut after so many in a row."""
    path: Path | None = None
    """None for a generated one."""


@lru_cache(maxsize=6)
def window(source: Source, seed: int) -> Trace:
    """Turns of which the first starts at 0. Raises TraceError."""
    if source.path is None:
        found = _generated(source, seed)
    else:
        trace = _recorded(source.path)
        by_clock = all(turn.after is None for turn in trace.turns)
        found = _consecutive(trace, source, seed) if by_clock else _sessions(trace, source, seed)
    return replace(found, name=source.name)


def _generated(source: Source, seed: int) -> Trace:
    # Some sessions are cut short, so there must be more of them than the mean asks for.
    spec = GENERATED[source.name].model_copy(update={"sessions": source.requests})
    trace = generate(spec, seed)
    return _kept(trace, _short(trace, range(len(trace.turns)), source.turns)).limited(source.requests)


def _consecutive(trace: Trace, source: Source, seed: int) -> Trace:
    turns = sorted((t for t in trace.turns if t.prompt_tokens + t.output_tokens <= MAX_TOKENS), key=_start)
    first = _place(len(turns) - source.requests, seed)
    chosen = turns[first : first + source.requests]
    return replace(trace, turns=tuple(replace(t, delay_s=t.delay_s - chosen[0].delay_s) for t in chosen))


def _sessions(trace: Trace, source: Source, seed: int) -> Trace:
    """Sessions from a place on, around the end of the file if need be, until there are enough requests."""
    sessions: dict[str | None, list[int]] = {}
    for number in _short(trace, range(len(trace.turns)), source.turns):
        sessions.setdefault(trace.turns[number].session, []).append(number)
    groups = list(sessions.values())
    first = _place(len(groups), seed)
    groups = groups[first:] + groups[:first]
    enough = next((i for i, n in enumerate(accumulate(map(len, groups)), 1) if n >= source.requests), len(groups))
    starts = Starts(1.0, seed=seed).times()
    moved: dict[int, float] = {}
    for group, at in zip(groups[:enough], starts, strict=False):
        began = min(trace.turns[n].delay_s for n in group if trace.turns[n].after is None)
        moved.update({n: trace.turns[n].delay_s - began + at for n in group if trace.turns[n].after is None})
    turns = tuple(replace(t, delay_s=moved.get(n, t.delay_s)) for n, t in enumerate(trace.turns))
    chosen = [n for group in groups[:enough] for n in group]
    return _kept(replace(trace, turns=turns), chosen[: source.requests])


def _place(places: int, seed: int) -> int:
    """Multiples of the golden ratio: however many seeds, they lie far apart."""
    return int(max(places, 0) * (seed * _GOLDEN % 1.0))


def _short(trace: Trace, numbers: Iterable[int], turns: int) -> list[int]:
    """Without what lies behind so many turns, behind one too long, or behind one left out."""
    depths: dict[int, int] = {}
    for number in numbers:
        turn = trace.turns[number]
        depth = 0 if turn.after is None else depths.get(turn.after, turns) + 1
        if depth < turns and turn.prompt_tokens + turn.output_tokens <= MAX_TOKENS:
            depths[number] = depth
    return list(depths)


def _kept(trace: Trace, numbers: Iterable[int]) -> Trace:
    """Only these turns, in this order; each comes after the one that it waits for."""
    places: dict[int, int] = dict(zip(numbers, count(), strict=False))
    turns = (
        replace(t, after=None if t.after is None else places[t.after]) for t in map(trace.turns.__getitem__, places)
    )
    return replace(trace, turns=tuple(turns))


def _start(turn: Turn) -> float:
    return turn.delay_s


@lru_cache(maxsize=2)
def _recorded(path: Path) -> Trace:
    trace = load(path, starts=Starts(1.0, max_pause_s=MAX_PAUSE_S))
    if all(turn.after is None for turn in trace.turns):
        return trace
    return _coarser(trace, max(BLOCK // trace.block_size, 1))


def _coarser(trace: Trace, factor: int) -> Trace:
    """With blocks `factor` times as large: the id of a chain's last small block stands for all of it."""
    turns = (replace(t, runs=joined((i, 1) for i in t.hashes()[factor - 1 :: factor])) for t in trace.turns)
    return replace(trace, block_size=trace.block_size * factor, turns=tuple(turns))
