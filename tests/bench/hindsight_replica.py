"""One replica in virtual time with nobody around it: the engine, fed with requests at fixed times, that can be copied.

It gives the times that `sim/node.py` gives in a cluster where nobody looks at the replica while it runs, to the last bit, and
does so without a timeline: the next wake-up is the only event beside the arrivals. Where a cluster does look (scrapes,
progress entries), its times differ by rounding alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from extproc.sim.blocks import BlockPool
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, RequestId, Step, _Decoding, _Sequence


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and its moment; `request.id` is its rank in the order of all arrivals."""

    at_s: float
    request: EngineRequest


class RefusedError(ValueError):
    """An engine would never run a request of the trace."""


class Replica:
    """The engine and the step that it is in. `arrive` and `advance` go forward in time only."""

    __slots__ = ("_engine", "_quiet", "_started", "_step", "cached", "first_s", "last_s", "wake_s")

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)
        self._step: Step | None = None
        self._started = 0.0
        self._quiet = 0
        self.wake_s = math.inf
        """When it next does something by itself."""
        self.first_s: dict[RequestId, float] = {}
        """Rank -> first token, of those that came since the start or since the copy."""
        self.last_s: dict[RequestId, float] = {}
        self.cached: dict[RequestId, int] = {}

    def __repr__(self) -> str:
        return f"<replica {self._engine!r}, wakes at {self.wake_s:.3f} s>"

    def present(self) -> list[int]:
        """Ranks of the requests that have not ended."""
        return cast(list[int], list(self._engine._sequences))

    def copy(self) -> Replica:
        """The same state, with nothing recorded."""
        twin = object.__new__(Replica)
        twin._engine, twin._step = _copied(self._engine, self._step)
        twin._started, twin._quiet, twin.wake_s = self._started, self._quiet, self.wake_s
        twin.first_s, twin.last_s, twin.cached = {}, {}, {}
        return twin

    def arrive(self, arrival: Arrival) -> None:
        """Queue a request; everything before `arrival.at_s` must have happened. Raises RefusedError."""
        now, step = arrival.at_s, self._step
        if step is not None and self._quiet:
            self._cut(step, now)
        if refusal := self._engine.add(arrival.request):
            raise RefusedError(f"request {arrival.request.id} could never run: {refusal}")
        if step is None:
            self._next(now)

    def _cut(self, step: Step, now: float) -> None:
        over = min(step.whole_steps(now - self._started), self._quiet)
        if over:
            self._started += step.lasting_s(over)
            self._engine.skip(step, over)
        if over < self._quiet:
            self.wake_s = max(self._started + step.duration_s, now)
        self._quiet = 0

    def advance(self, until_s: float) -> None:
        """Let everything happen that happens before `until_s`."""
        while self.wake_s < until_s:
            self.advance_once()

    def advance_once(self) -> None:
        """Let the next thing happen. Only while there is something to do."""
        now, step, engine = self.wake_s, self._step, self._engine
        assert step is not None
        if self._quiet:
            engine.skip(step, self._quiet)
        edges = engine.finish_step(step).edges
        self._next(now)
        for token in edges:
            rank = token.id
            if token.first:
                self.first_s[rank] = now
                self.cached[rank] = token.cached_tokens
            if token.finished:
                self.last_s[rank] = now

    def _next(self, now: float) -> None:
        engine = self._engine
        step = self._step = engine.start_step()
        if step is None:
            self._quiet, self.wake_s = 0, math.inf
            return
        self._quiet = engine.quiet_steps(step)
        self._started = now
        self.wake_s = now + step.lasting_s(self._quiet + 1)


# --- copies -----------------------------------------------------------------------------------------------------------


def _copied(engine: Engine, step: Step | None) -> tuple[Engine, Step | None]:
    """By hand: `copy.deepcopy` takes 18 times as long, most of it for what never changes."""
    assert engine.adapters is None, "no requests for adapters here"
    twin = object.__new__(Engine)
    twin.adapters = None
    twin.config = engine.config
    twin.pool = _copied_pool(engine.pool)
    twin.counters = replace(engine.counters)
    twins = {i: _copied_sequence(seq) for i, seq in engine._sequences.items()}
    twin._sequences = twins
    twin._waiting = OrderedDict((i, twins[i]) for i in engine._waiting)
    twin._running = {i: twins[i] for i in engine._running}
    twin._decoding = _copied_decoding(engine._decoding, twins)
    twin._partial = twins[engine._partial.request.id] if engine._partial else None
    twin._ahead = _copied_step(engine._ahead, twins)
    twin._stuck = engine._stuck
    return twin, None if step is None else _copied_step(step, twins)


def _copied_pool(pool: BlockPool) -> BlockPool:
    twin = BlockPool(pool.num_blocks)
    twin.blank, twin.held, twin.idle = pool.blank, pool.held.copy(), pool.idle.copy()
    twin._copies = {of: copies.copy() for of, copies in pool._copies.items()}
    return twin


def _copied_sequence(seq: _Sequence) -> _Sequence:
    twin = object.__new__(_Sequence)
    for name in _Sequence.__slots__:
        setattr(twin, name, getattr(seq, name))
    twin.keys = seq.keys.copy()
    return twin


def _copied_decoding(decoding: _Decoding, twins: Mapping[RequestId, _Sequence]) -> _Decoding:
    """A sequence is filed everywhere at once, so each file has the order of `sequences`."""
    twin = object.__new__(_Decoding)
    twin.block_size, twin.kv_tokens = decoding.block_size, decoding.kv_tokens
    twin.sequences = {i: twins[i] for i in decoding.sequences}
    growing: defaultdict[int, dict[RequestId, _Sequence]] = defaultdict(dict)
    for i, seq in twin.sequences.items():
        growing[-seq.offset % decoding.block_size][i] = seq
    twin.growing = cast(list[dict[RequestId, _Sequence]], growing)
    twin.ending = {last: {i: twins[i] for i in ending} for last, ending in decoding.ending.items()}
    return twin


def _copied_step(step: Step, twins: Mapping[RequestId, _Sequence]) -> Step:
    prefills = [twins[seq.request.id] for seq in step.prefills]
    return replace(step, chunks=step.chunks.copy(), prefills=prefills, admitted=[])
