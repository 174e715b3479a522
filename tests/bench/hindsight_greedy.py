"""A router that knows the exact state of every engine and all true lengths, but not who comes next."""

from __future__ import annotations

from extproc.sim.cluster import Scenario
from tests.bench.hindsight_fleet import Problem
from tests.bench.hindsight_replica import Arrival, Replica


def exact_greedy(scenario: Scenario) -> list[str]:
    """Addresses by turn: each to where its TTFT, and what it adds to the TTFT of those already there, is least in sum.

    Both are simulated, on a copy of each engine, until the last first token that is due. Raises ValueError as `hindsight`.
    """
    problem = Problem.of(scenario)
    candidates = [_Candidate(Replica(config)) for config in problem.configs]
    assignment = [""] * len(problem.turns)
    for arrival, turn in zip(problem.arrivals, problem.turns, strict=True):
        for candidate in candidates:
            candidate.replica.advance(arrival.at_s)
        best = min(range(len(candidates)), key=lambda place: candidates[place].rating(arrival))
        candidates[best].take(arrival)
        assignment[turn] = problem.addresses[best]
    return assignment


class _Candidate:
    """A replica, and what is due there unless somebody else comes."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._taken = 0
        self._due: dict[int, float] = {}
        """Request -> moment of its first token, also of some that had it already."""
        self._with: dict[int, float] = {}
        """The same, had it taken the request that was rated last."""

    def rating(self, arrival: Arrival) -> tuple[float, int, int]:
        """Seconds that it costs; then, for idle replicas are level, how many run there and how many it has taken."""
        # First come, first served: when the newcomer has its first token, so have all before it.
        trial = self.replica.copy()
        trial.arrive(arrival)
        rank = arrival.request.id
        while rank not in trial.first_s:
            trial.advance_once()
        due = {each: at_s for each, at_s in self._due.items() if at_s >= arrival.at_s}
        added_s = sum(trial.first_s[each] - at_s for each, at_s in due.items())
        self._with = {each: trial.first_s[each] for each in due} | {int(str(rank)): trial.first_s[rank]}
        return added_s + trial.first_s[rank] - arrival.at_s, len(self.replica.present()), self._taken

    def take(self, arrival: Arrival) -> None:
        """The request rated last comes here."""
        self.replica.arrive(arrival)
        self._due = self._with
        self._taken += 1
