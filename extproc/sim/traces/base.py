"""What every trace comes down to: turns, each with its tokens, its block ids, and the moment or the turn that starts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

Run: TypeAlias = tuple[int, int]
"""Consecutive block ids: the first, and how many."""


class TraceError(Exception):
    """The trace cannot be used; the text says where and what to do."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request."""

    prompt_tokens: int
    output_tokens: int
    delay_s: float
    """Seconds from the start of the trace, or from the end of the turn `after`."""
    after: int | None = None
    """Position of an earlier turn of the trace, which must end first; None starts by the clock."""
    runs: tuple[Run, ...] = ()
    """Ids of the full blocks of the prompt, then of the output as far as known. Equal id, equal content up to its end."""
    session: str | None = None
    tenant: str | None = None
    priority: int = 0
    """Higher goes first."""
    adapter: str | None = None
    """The LoRA adapter that it asks for; None for the base model. Prompts for different ones share no block."""

    def hashes(self, ratio: int = 1) -> tuple[int, ...]:
        """The block ids one by one, each split into `ratio` smaller blocks."""
        return tuple(i for start, length in self.runs for i in range(start * ratio, (start + length) * ratio))


@dataclass(frozen=True, slots=True)
class Trace:
    """Turns in the order of the file; those that start by the clock need not be sorted."""

    name: str
    block_size: int
    """Tokens of one block."""
    turns: tuple[Turn, ...]

    def __repr__(self) -> str:
        return f"<trace {self.name} {len(self.turns)} turns, blocks of {self.block_size}>"

    def limited(self, turns: int) -> Trace:
        """The first so many turns. A turn waits only for earlier ones, so none is left waiting for ever."""
        return replace(self, turns=self.turns[:turns])

    def faster(self, factor: float) -> Trace:
        """All that starts by the clock comes sooner by that factor; pauses after an answer stay, for they are people's and tools'."""
        return replace(
            self,
            turns=tuple(t if t.after is not None else replace(t, delay_s=t.delay_s / factor) for t in self.turns),
        )


@dataclass(frozen=True, slots=True)
class Starts:
    """How sessions that were recorded each on its own are laid over each other."""

    sessions_per_s: float = 0.1
    """Mean of the Poisson arrivals."""
    sessions: int | None = None
    """Only the first so many; None for all."""
    max_pause_s: float | None = None
    """Longer pauses between turns are cut to this: some users came back the next day."""
    seed: int = 1

    def times(self) -> Iterator[float]:
        """When the sessions begin, seconds; the first at 0."""
        rng, at = Random(f"{self.seed}/sessions"), 0.0
        while True:
            yield at
            at += rng.expovariate(self.sessions_per_s)


def joined(parts: Iterable[Run]) -> tuple[Run, ...]:
    """The same ids in as few runs as possible."""
    runs: list[Run] = []
    for start, length in parts:
        if length <= 0:
            continue
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((start, length))
    return tuple(runs)


def head(runs: Iterable[Run], blocks: int) -> tuple[Run, ...]:
    """The first `blocks` ids."""
    kept: list[Run] = []
    for start, length in runs:
        if blocks <= 0:
            break
        kept.append((start, min(length, blocks)))
        blocks -= length
    return tuple(kept)
