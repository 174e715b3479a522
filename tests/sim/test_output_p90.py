"""The p90 of output lengths is a promise: on generated traffic, nine answers in ten keep to it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from extproc.core.types import End, Outcome, Request
from extproc.sim.cluster import Cluster, Scenario, _Call
from extproc.sim.fleet_spec import Group, nodes
from extproc.sim.traces import Generate, Trace, Turn, generate

MEDIANS = (40, 150, 400, 900)
"""Output tokens by tenant."""
BEGINNING = 100
"""Answers until the lengths count as learned."""


class Promised(Cluster):
    """A cluster whose clients send `max_tokens` with some requests, and which notes what was promised of each answer."""

    def __init__(self, trace: Trace, caps: dict[int, int]) -> None:
        super().__init__(
            Scenario(trace, nodes([Group(gpu="h100", count=4)], "8b", trace.block_size, 0.002)), "predicted"
        )
        self.caps = caps
        self.kept: list[bool] = []
        """Whether each answer was as short as its p90, in the order of their ends."""

    def _request(self, number: int, turn: Turn, hashes: tuple[int, ...]) -> Request:
        return replace(super()._request(number, turn, hashes), max_output_tokens=self.caps.get(number))

    def _outcome(self, call: _Call, end: End, status: int, tokens: int) -> Outcome:
        assert call.decision is not None
        self.kept.append(tokens <= call.decision.output_p90_tokens)
        return super()._outcome(call, end, status, tokens)


def coverage(trace: Trace, caps: dict[int, int]) -> float:
    cluster = Promised(trace, caps)
    cluster.run()
    late = cluster.kept[BEGINNING:]
    return sum(late) / len(late)


def workload(seed: int, capped_share: float, cap: int, sigma: float) -> tuple[Trace, dict[int, int]]:
    """Some 600 requests of four tenants, and `max_tokens` of those that have it."""
    trace = generate(Generate(sessions=150, sessions_per_s=0.5, tenants=len(MEDIANS)), seed)
    rng, turns, caps = Random(seed), [], {}
    for number, turn in enumerate(trace.turns):
        assert turn.tenant is not None
        tokens = max(round(MEDIANS[int(turn.tenant[1:])] * rng.lognormvariate(0.0, sigma)), 1)
        if rng.random() < capped_share:
            caps[number] = cap
            tokens = min(tokens, cap)
        turns.append(replace(turn, output_tokens=tokens))
    return replace(trace, turns=tuple(turns)), caps


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("capped_share", "cap", "sigma"),
    [(0.0, 1, 0.8), (0.3, 200, 0.8), (0.3, 2000, 0.4), (1.0, 4000, 1.0)],
    ids=["no caps", "caps that bind", "caps beyond most", "everybody has a cap"],
)
def test_nine_answers_in_ten_are_no_longer_than_the_p90(seed: int, capped_share: float, cap: int, sigma: float) -> None:
    assert 0.85 <= coverage(*workload(seed, capped_share, cap, sigma)) <= 0.95
