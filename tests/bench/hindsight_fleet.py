"""A fleet under one assignment of requests to replicas, and what a change of it would bring.

Arrival times are fixed and replicas do not touch each other, so a change is simulated on the replicas concerned alone, from a
checkpoint shortly before it. Requests go by their rank in the order of arrival, replicas by their place in the fleet.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from extproc.sim.cluster import Scenario
from extproc.sim.engine import EngineConfig, EngineRequest, RequestId
from extproc.sim.traces import Trace
from tests.bench.hindsight_replica import Arrival, Replica

SPACING: Final = 4
"""Arrivals between two checkpoints of a replica: a copy costs as much as two arrivals."""
KEPT_BLOCKS: Final = 1_000_000
"""Blocks that all checkpoints together may remember, 100 to 150 bytes each; where caches are large, they lie further apart."""

Move: TypeAlias = tuple[int, int]
"""A request, and the replica that it goes to."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be placed, where, and what counts."""

    addresses: tuple[str, ...]
    configs: tuple[EngineConfig, ...]
    arrivals: tuple[Arrival, ...]
    """By rank."""
    turns: tuple[int, ...]
    """Rank -> place in the trace."""
    weights: tuple[float, ...]
    """By rank: 1 where the request is scored, else 0."""
    e2e_weight: float
    """The objective is the sum of TTFT + `e2e_weight` * E2E, seconds."""

    @classmethod
    def of(cls, scenario: Scenario, scored: Collection[int] | None = None, e2e_weight: float = 0.0) -> Problem:
        """`scored`: places in the trace; None is all. Raises ValueError where arrivals are not fixed, or a replica fails."""
        trace = scenario.trace
        if scenario.incidents or any(turn.after is not None for turn in trace.turns):
            raise ValueError(
                "hindsight needs a trace whose turns all start by the clock, and a fleet that nothing befalls"
            )
        turns = tuple(sorted(range(len(trace.turns)), key=lambda n: (trace.turns[n].delay_s, n)))
        counts = None if scored is None else frozenset(scored)
        return cls(
            tuple(spec.replica.address for spec in scenario.fleet),
            tuple(spec.engine for spec in scenario.fleet),
            tuple(_arrivals(trace, turns, scenario.fleet[0].engine.block_size)),
            turns,
            tuple(float(counts is None or n in counts) for n in turns),
            e2e_weight,
        )

    def places(self, assignment: Sequence[str]) -> list[int]:
        """By rank, of addresses by turn. Raises ValueError."""
        if len(assignment) != len(self.turns):
            raise ValueError(f"{len(assignment)} addresses for {len(self.turns)} turns")
        return [self.addresses.index(assignment[n]) for n in self.turns]


def _arrivals(trace: Trace, turns: Iterable[int], block_size: int) -> Iterable[Arrival]:
    for rank, n in enumerate(turns):
        turn = trace.turns[n]
        hashes = turn.hashes(trace.block_size // block_size)
        yield Arrival(turn.delay_s, EngineRequest(rank, turn.prompt_tokens, turn.output_tokens, hashes))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A replica right after an arrival."""

    rank: int
    """Of that arrival; -1 before all."""
    at_s: float
    replica: Replica


class Placement:
    """An assignment with all that comes of it; `attempt` changes it."""

    def __init__(self, problem: Problem, places: Sequence[int]) -> None:
        self.problem = problem
        self.places = list(places)
        """Rank -> replica."""
        n = len(self.places)
        self.first_s = [math.inf] * n
        """Moment of the first token, by rank."""
        self.last_s = [math.inf] * n
        self.cached = [0] * n
        self.evaluations = 0
        """Simulations of one replica that were begun."""
        self.queues: list[list[int]] = [[] for _ in problem.configs]
        """Ranks by replica, ascending."""
        for rank, place in enumerate(self.places):
            self.queues[place].append(rank)
        self.checkpoints = [[Checkpoint(-1, -math.inf, Replica(config))] for config in problem.configs]
        blocks = max((config.num_blocks for config in problem.configs), default=0)
        self.spacing = max(SPACING, math.ceil(n * blocks / KEPT_BLOCKS))
        for place in range(len(problem.configs)):
            trial = Trial(self, place, 0, frozenset(), ())
            trial.run(math.inf, keep=True)
            trial.commit()
        self.objective_s = self._objective_s()

    def __repr__(self) -> str:
        return f"<placement of {len(self.places)} requests on {len(self.queues)} replicas, {self.objective_s:.3f} s>"

    def _objective_s(self) -> float:
        problem, e2e = self.problem, self.problem.e2e_weight
        times = zip(problem.weights, problem.arrivals, self.first_s, self.last_s, strict=True)
        return math.fsum(w * (first - a.at_s + e2e * (last - a.at_s)) for w, a, first, last in times)

    def attempt(self, moves: Sequence[Move], limit_s: float, horizons_s: Sequence[float] = ()) -> float | None:
        """Make the moves if the objective then changes by less than `limit_s`. Returns the change, None where they were not made.

        `horizons_s`, ascending: seconds after the last move at which what has changed so far must be below the limit too.
        """
        trials = self._trials(moves)
        self.evaluations += len(trials)
        from_s = max(self.problem.arrivals[rank].at_s for rank, _ in moves)
        for horizon_s in horizons_s:
            if sum(trial.change_s(from_s + horizon_s) for trial in trials) >= limit_s:
                return None
        change_s = sum(trial.change_s(math.inf, keep=True) for trial in trials)
        if change_s >= limit_s:
            return None
        for trial in trials:
            trial.commit()
        self.objective_s += change_s
        return change_s

    def _trials(self, moves: Sequence[Move]) -> list[Trial]:
        leaving: dict[int, set[int]] = {}
        coming: dict[int, list[int]] = {}
        for rank, to in moves:
            leaving.setdefault(self.places[rank], set()).add(rank)
            coming.setdefault(to, []).append(rank)
        since = min(rank for rank, _ in moves)
        # In a fixed order: sets of replicas would let the last bits of the sum depend on the order of hashes.
        concerned = sorted({*leaving, *coming})
        return [Trial(self, place, since, leaving.get(place, set()), coming.get(place, ())) for place in concerned]


class Trial:
    """One replica from a checkpoint on, without some of its requests and with some of others."""

    __slots__ = ("_after", "_before", "_from", "_kept", "_next", "_place", "_placement", "_present", "_replica")

    def __init__(
        self, placement: Placement, place: int, since: int, leaving: Collection[int], coming: Collection[int]
    ) -> None:
        """Nothing changes before the request `since`."""
        checkpoints, queue = placement.checkpoints[place], placement.queues[place]
        self._placement, self._place = placement, place
        self._from = checkpoints[bisect_left(checkpoints, since, key=_rank) - 1]
        self._replica = self._from.replica.copy()
        self._present = self._replica.present()
        self._before = queue[bisect_right(queue, self._from.rank) :]
        """Who arrived after the checkpoint as it is now, and in this trial."""
        self._after = sorted([*(rank for rank in self._before if rank not in leaving), *coming])
        self._next = 0
        self._kept: list[Checkpoint] = []

    def run(self, until_s: float, keep: bool = False) -> None:
        """Simulate what happens before `until_s`; with `keep`, take checkpoints for `commit`."""
        replica, arrivals = self._replica, self._placement.problem.arrivals
        for rank in self._after[self._next :]:
            arrival = arrivals[rank]
            if arrival.at_s >= until_s:
                break
            replica.advance(arrival.at_s)
            replica.arrive(arrival)
            self._next += 1
            if keep and self._next % self._placement.spacing == 0:
                self._kept.append(Checkpoint(rank, arrival.at_s, replica.copy()))
        replica.advance(until_s)

    def change_s(self, until_s: float, keep: bool = False) -> float:
        """By how much the objective changes as far as it is known at `until_s`: what is still to come counts up to then."""
        self.run(until_s, keep)
        placement, replica = self._placement, self._replica
        change_s = self._longer_s(replica.first_s, placement.first_s, until_s)
        if e2e := placement.problem.e2e_weight:
            change_s += e2e * self._longer_s(replica.last_s, placement.last_s, until_s)
        return change_s

    def _longer_s(self, now: Mapping[RequestId, float], before: Sequence[float], until_s: float) -> float:
        """Of the time until some event of the requests, the change; `now` holds those since the checkpoint."""
        arrivals, weights = self._placement.problem.arrivals, self._placement.problem.weights
        longer_s = 0.0
        for rank in self._present:
            if before[rank] >= self._from.at_s:
                longer_s += weights[rank] * (now.get(rank, until_s) - min(before[rank], until_s))
        for rank in self._after[: self._next]:
            longer_s += weights[rank] * (now.get(rank, until_s) - arrivals[rank].at_s)
        for rank in self._before:
            if (at_s := arrivals[rank].at_s) >= until_s:
                break
            longer_s -= weights[rank] * (min(before[rank], until_s) - at_s)
        return longer_s

    def commit(self) -> None:
        """Make it so; it must have run to the end."""
        placement, replica, place = self._placement, self._replica, self._place
        for rank in (*self._present, *self._after):
            placement.first_s[rank] = replica.first_s.get(rank, placement.first_s[rank])
            placement.last_s[rank] = replica.last_s[rank]
            placement.cached[rank] = replica.cached.get(rank, placement.cached[rank])
        queue, checkpoints = placement.queues[place], placement.checkpoints[place]
        queue[bisect_right(queue, self._from.rank) :] = self._after
        checkpoints[bisect_right(checkpoints, self._from.rank, key=_rank) :] = self._kept
        for rank in self._after:
            placement.places[rank] = place


def _rank(checkpoint: Checkpoint) -> int:
    return checkpoint.rank
