"""Our rule `dynamo` beside Dynamo's own selector, decision by decision, in the same state.

A run of ours with the rule is taped: at each decision who was there, whose prefill was done, what was chosen. The selector's
books follow the tape, so one other choice does not make the next one differ too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final

from extproc.core.fleet import Member
from extproc.core.policies.base import REGISTRY, Ranking
from extproc.core.prediction import Ask
from extproc.sim.cluster import Cluster, Scenario
from extproc.sim.traces import Trace
from tests.bench.baselines.dynamo import BLOCK_TOKENS, Dynamo
from tests.bench.dynamo_mocker import BLOCK

TIE: Final = "a tie, broken by lot"
_LEVEL: Final = 1e-6
"""Blocks; costs this close are equal."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a selector looks at on one worker."""

    queued_tokens: float
    """Of prompts whose prefill is not done."""
    cached_tokens: float
    """Of this prompt."""
    held_blocks: float
    """Of prompts in flight and of this one, equal ones once."""

    def cost(self, prompt_tokens: int) -> float:
        """Blocks, by Dynamo's published formula with its defaults."""
        return max(self.queued_tokens + prompt_tokens - self.cached_tokens, 0.0) / BLOCK + self.held_blocks


@dataclass(slots=True)
class Row:
    """One decision."""

    id: str
    prompt_tokens: int
    runs: tuple[tuple[int, int], ...]
    prefilled: list[str]
    """Whose prefill was done since the row before, as our ledger believes."""
    ended: list[str]
    workers: dict[int, Worker]
    """The candidates, as our rule saw them: no replica is one before it was sampled."""
    chosen: int = -1
    uncached_tokens: int = 0


@dataclass(slots=True)
class Tape:
    """Decisions, as they are taken."""

    addresses: list[str]
    rows: list[Row] = field(default_factory=list)
    _open: dict[int, Row] = field(default_factory=dict)
    """By the identity of the request's blocks, which its flight shares."""
    _prefilled: set[int] = field(default_factory=set)
    _kept: list[Ask] = field(default_factory=list)
    """So that no identity is given away twice."""

    def note(self, ask: Ask, workers: Sequence[Worker], members: Sequence[Member], now: float) -> None:
        """A decision is about to be taken."""
        flights = {id(flight.blocks): flight for member in members for flight in member.load}
        ended = [key for key in self._open if key not in flights]
        done = [
            key
            for key, flight in flights.items()
            if key not in self._prefilled and (flight.first_token_at is not None or flight.prefill_done_at <= now)
        ]
        row = Row(
            id=str(len(self.rows)),
            prompt_tokens=ask.prompt_tokens,
            runs=tuple((block, 1) for block in ask.request.blocks.hashes),
            prefilled=[self._open[key].id for key in done],
            ended=[self._open.pop(key).id for key in ended],
            workers={self.addresses.index(m.address): worker for m, worker in zip(members, workers, strict=True)},
        )
        self._prefilled.update(done)
        self.rows.append(row)
        self._kept.append(ask)

    def took(self, ask: Ask, member: Member) -> None:
        """The decision."""
        row = self.rows[-1]
        row.chosen = self.addresses.index(member.address)
        row.uncached_tokens = ask.prompt_tokens - ask.cached_tokens(member)
        self._open[id(ask.request.blocks)] = row


@contextmanager
def _taped(tape: Tape) -> Iterator[str]:
    """The rule `dynamo`, selectable by the name given, writing a tape."""

    class Taped(Dynamo):
        name = "dynamo_taped"

        def rank(self, ask: Ask, members: Sequence[Member], now: float, rng: Random) -> Ranking:
            tape.note(ask, [self.worker(ask, m, now) for m in members], members, now)
            return Dynamo.rank(self, ask, members, now, rng)

        def took(self, ask: Ask, member: Member) -> None:
            Dynamo.took(self, ask, member)
            tape.took(ask, member)

        def worker(self, ask: Ask, member: Member, now: float) -> Worker:
            held = self.terms(ask, member, now)["decode_blocks"]
            assert held is not None
            return Worker(member.load.queued_tokens(now), ask.cached_tokens(member), held * BLOCK_TOKENS / BLOCK)

    REGISTRY[Taped.name] = Taped
    try:
        yield Taped.name
    finally:
        del REGISTRY[Taped.name]


def taped(scenario: Scenario) -> list[Row]:
    """Run the scenario with our rule; its decisions in their order."""
    tape = Tape([spec.replica.address for spec in scenario.fleet])
    with _taped(tape) as policy:
        Cluster(scenario, policy).run()
    return tape.rows


def ample_blocks(trace: Trace) -> int:
    """A cache in which nothing is ever evicted: the selector, told of no evictions, then forgets as little as ours."""
    return sum((t.prompt_tokens + t.output_tokens) // trace.block_size + 1 for t in trace.turns)


# --- compared ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the choices compare."""

    decisions: int
    equal: int
    by_formula: int
    """Of the selector's choices, those of least cost by the published formula, on what it says it saw."""
    causes: dict[str, int]
    """Of the others."""


def agreement(rows: Sequence[Row], answers: Sequence[dict[str, Any]]) -> Agreement:
    """`answers`: the selector's choice and what it saw, by row."""
    causes: Counter[str] = Counter()
    by_formula = 0
    for row, answer in zip(rows, answers, strict=True):
        theirs = {each["worker"]: _worker(each) for each in answer["workers"] if each["worker"] in row.workers}
        by_formula += answer["chosen"] in _least(theirs, row.prompt_tokens)
        if answer["chosen"] != row.chosen:
            causes[cause(row, theirs, answer["chosen"])] += 1
    return Agreement(len(rows), len(rows) - causes.total(), by_formula, dict(causes.most_common()))


def cause(row: Row, theirs: Mapping[int, Worker], chosen: int) -> str:
    """Why the selector chose otherwise: the first single thing that, seen as it saw it, lets our rule choose the same."""
    if any({row.chosen, chosen} <= _least(seen, row.prompt_tokens) for seen in (row.workers, theirs)):
        return TIE
    for name in ("queued_tokens", "cached_tokens", "held_blocks"):
        mixed = {i: replace(ours, **{name: getattr(theirs[i], name)}) for i, ours in row.workers.items()}
        if chosen in _least(mixed, row.prompt_tokens):
            return name.replace("_", " ")
    return "several of these" if chosen in _least(theirs, row.prompt_tokens) else "another formula"


def _worker(seen: dict[str, Any]) -> Worker:
    return Worker(seen["queued_tokens"], seen["cached_tokens"], seen["held_blocks"])


def _least(workers: Mapping[int, Worker], prompt_tokens: int) -> set[int]:
    """Those of least cost."""
    costs = {i: worker.cost(prompt_tokens) for i, worker in workers.items()}
    limit = min(costs.values()) + _LEVEL
    return {i for i, each in costs.items() if each <= limit}
