"""A replica in virtual time does what its engine does step by step, and can die, hang, slow down and come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.steptime import StepTime
from extproc.core.types import Replica
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, Refusal, Token
from extproc.sim.node import Node, NodeSpec
from extproc.sim.timeline import Timeline

STEP = StepTime(c0=1.0, w=0.5, g=0.02, a=0.001, k=0.003, s=0.1)


def config(num_blocks: int = 200, block_size: int = 4, async_scheduling: bool = True) -> EngineConfig:
    return EngineConfig(
        STEP,
        num_blocks,
        block_size,
        max_num_batched_tokens=32,
        max_num_seqs=6,
        async_scheduling=async_scheduling,
        cpu_overhead_s=0.25,
    )


@dataclass
class Heard:
    """Whoever sent the requests: when what came."""

    timeline: Timeline
    firsts: dict[int, float] = field(default_factory=dict)
    lasts: dict[int, float] = field(default_factory=dict)
    begun: dict[int, float] = field(default_factory=dict)

    def scheduled(self, request: int) -> None:
        self.begun.setdefault(request, self.timeline.now)

    def token(self, token: Token) -> None:
        assert isinstance(token.id, int)
        if token.first:
            self.firsts[token.id] = self.timeline.now
        if token.finished:
            self.lasts[token.id] = self.timeline.now


@dataclass
class Bench:
    """One node, its timeline and its listener."""

    engine: EngineConfig = field(default_factory=config)

    def __post_init__(self) -> None:
        self.timeline = Timeline()
        self.heard = Heard(self.timeline)
        self.node = Node(NodeSpec(Replica("10.0.0.1:8000"), self.engine), self.timeline, self.heard)

    def send(self, at: float, id_: int, prompt: int, output: int) -> None:
        request = EngineRequest(id_, prompt, output, tuple(range(prompt // self.engine.block_size)))
        self.timeline.at(at, lambda _: self.node.submit(request))

    def until(self, when: float) -> None:
        self.timeline.at(when, lambda _: None)
        while self.timeline.now < when:
            self.timeline.step()

    def drain(self) -> None:
        while len(self.timeline):
            self.timeline.step()
            self.node.check()


Arrivals = list[tuple[float, int, int]]


def step_by_step(engine_config: EngineConfig, arrivals: Arrivals) -> tuple[dict[int, float], dict[int, float], Engine]:
    """The same without skipping: first and last token times."""
    engine, now = Engine(engine_config), 0.0
    waiting = [
        (at, EngineRequest(i, p, o, tuple(range(p // engine_config.block_size))))
        for i, (at, p, o) in arrivals_of(arrivals)
    ]
    firsts: dict[int, float] = {}
    lasts: dict[int, float] = {}
    while True:
        while waiting and waiting[0][0] <= now:
            engine.add(waiting.pop(0)[1])
        step = engine.start_step()
        if step is None:
            if not waiting:
                return firsts, lasts, engine
            now = waiting[0][0]
            continue
        end = now + step.duration_s
        while waiting and waiting[0][0] < end:
            engine.add(waiting.pop(0)[1])
        now = end
        for token in engine.finish_step(step).edges:
            assert isinstance(token.id, int)
            if token.first:
                firsts[token.id] = now
            if token.finished:
                lasts[token.id] = now


def arrivals_of(arrivals: Arrivals) -> list[tuple[int, tuple[float, int, int]]]:
    return list(enumerate(sorted(arrivals)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 300, allow_nan=False), st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=14
    ),
    st.sampled_from([40, 60, 200]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_skipping_quiet_steps_changes_nothing(arrivals: Arrivals, num_blocks: int, ahead: bool, seed: int) -> None:
    # Times that no step ends at: which of two things at one moment comes first is not what is tested.
    rng = Random(seed)
    arrivals = [(at + rng.random() * 1e-3 + 1.2345e-7, prompt, output) for at, prompt, output in arrivals]
    bench = Bench(config(num_blocks, async_scheduling=ahead))
    for id_, (at, prompt, output) in arrivals_of(arrivals):
        bench.send(at, id_, prompt, output)
    for look in range(0, 600, 7):  # being looked at changes nothing either
        bench.timeline.at(look + 0.123, lambda _: bench.node.sample())
    bench.drain()
    firsts, lasts, engine = step_by_step(bench.engine, arrivals)
    assert bench.heard.firsts == pytest.approx(firsts, abs=1e-6)
    assert bench.heard.lasts == pytest.approx(lasts, abs=1e-6)
    totals, counters = bench.node.totals, engine.counters
    assert (totals.generated_tokens, totals.prompt_tokens) == (counters.generated_tokens, counters.prompt_tokens)
    assert totals.preemptions == counters.preemptions


def test_most_steps_are_skipped() -> None:
    bench = Bench()
    bench.send(0.0, 1, 8, 500)
    events = 0
    while len(bench.timeline):
        bench.timeline.step()
        events += 1
    assert bench.node.totals.generated_tokens == 500
    assert events < 10


def test_tokens_so_far_are_known_in_the_middle_of_a_stretch() -> None:
    bench = Bench(config(async_scheduling=False))
    bench.send(0.0, 1, 8, 100)
    bench.until(50.0)
    first = bench.heard.firsts[1]
    assert 0 < bench.node.emitted(1) < 100
    bench.until(50.0 + first)
    assert bench.node.emitted(1) > 1
    bench.drain()
    assert bench.node.emitted(1) == 0


def test_busy_time_is_the_time_of_its_steps() -> None:
    bench = Bench()
    bench.send(10.0, 1, 8, 20)
    bench.drain()
    assert bench.node.totals.busy_s == pytest.approx(bench.heard.lasts[1] - 10.0)


def test_gauges_tell_of_the_last_step_that_ended() -> None:
    bench = Bench()
    bench.send(1.0, 1, 8, 20)
    bench.until(1.1)
    assert bench.node.sample().running == 0
    bench.until(10.0)
    assert bench.node.sample().running == 1
    assert (bench.node.sample().kv_usage or 0) > 0


def test_one_that_dies_loses_what_it_had_and_comes_back_empty() -> None:
    bench = Bench()
    bench.send(0.0, 1, 40, 100)
    bench.send(0.0, 2, 40, 100)
    bench.until(60.0)
    lost = bench.node.die()
    assert [request for request, _ in lost] == [1, 2]
    assert all(tokens > 0 for _, tokens in lost)
    assert repr(bench.node) == "<node 10.0.0.1:8000 down>"
    bench.drain()
    assert bench.heard.lasts == {}
    bench.node.start()
    bench.send(bench.timeline.now, 3, 40, 1)
    bench.drain()
    assert 3 in bench.heard.lasts
    assert bench.node.sample().prefix_hits == 0.0
    assert bench.node.totals.prompt_tokens == 120


def test_one_that_hangs_says_what_it_said_and_computes_nothing() -> None:
    bench = Bench()
    bench.send(0.0, 1, 8, 100)
    bench.until(50.0)
    before = bench.node.sample()
    assert bench.node.hang() == [1]
    bench.send(51.0, 2, 8, 1)
    bench.drain()
    assert bench.node.sample() == before
    assert bench.heard.lasts == {}
    bench.node.abort(1)
    bench.node.abort(2)
    bench.node.check()


def test_a_slow_one_takes_longer_from_the_next_step_on() -> None:
    quick, slow = Bench(), Bench()
    for bench in (quick, slow):
        bench.send(0.0, 1, 8, 100)
    slow.timeline.at(50.0, lambda _: slow.node.slow(2.0))
    quick.drain()
    slow.drain()
    assert quick.heard.lasts[1] + 50 < slow.heard.lasts[1] < 2 * quick.heard.lasts[1]


def test_a_request_that_never_fits_is_refused() -> None:
    bench = Bench()
    assert bench.node.submit(EngineRequest(1, 10_000, 1)) is Refusal.TOO_LONG
    bench.node.check()
