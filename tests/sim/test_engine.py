from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.steptime import StepTime
from extproc.sim.engine import Engine, EngineConfig, EngineRequest, Refusal, Step, Token

STEP = StepTime(c0=1.0, w=0.0, g=0.01, a=0.001, k=0.0001, s=0.1)


def config(num_blocks: int = 100, **changes: object) -> EngineConfig:
    settings_: dict[str, object] = {
        "block_size": 4,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "cpu_overhead_s": 0.5,
        "async_scheduling": False,
    }
    return EngineConfig(STEP, num_blocks, **(settings_ | changes))  # type: ignore[arg-type]


def request(id_: int, prompt: int, output: int, hashes: Sequence[int] = ()) -> EngineRequest:
    return EngineRequest(id_, prompt, output, hashes)


def chain(*parts: int) -> tuple[int, ...]:
    """Hashes of blocks, each covering all before it."""
    return tuple(hash(parts[: i + 1]) for i in range(len(parts)))


@dataclass
class Run:
    """An engine driven to its end, with its books checked around every step."""

    engine: Engine
    tokens: dict[object, list[Token]] = field(default_factory=lambda: defaultdict(list))
    first_seen: list[object] = field(default_factory=list)
    ended: list[object] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def step(self) -> bool:
        step = self.engine.start_step()
        self.engine.check()
        if step is None:
            return False
        self.finish(step)
        return True

    def finish(self, step: Step) -> None:
        self.steps.append(step)
        emitted = self.engine.finish_step(step)
        for token in emitted:
            self.tokens[token.id].append(token)
            if token.first:
                self.first_seen.append(token.id)
            if token.finished:
                self.ended.append(token.id)
        self.engine.check()

    def drain(self, limit: int = 20_000) -> Run:
        for _ in range(limit):
            if not self.step():
                return self
        raise AssertionError(f"not idle after {limit} steps: {self.engine!r}")

    def cached(self, id_: object) -> int:
        return self.tokens[id_][0].cached_tokens


def run(cfg: EngineConfig, *requests: EngineRequest) -> Run:
    engine = Engine(cfg)
    for r in requests:
        assert engine.add(r) is None
    return Run(engine).drain()


# --- rules ------------------------------------------------------------------------------------------------------------


def test_an_idle_engine_has_nothing_to_do() -> None:
    assert Engine(config()).start_step() is None


def test_the_first_token_comes_with_the_end_of_prefill_and_one_more_with_each_step() -> None:
    done = run(config(), request(1, 10, 3))
    assert done.tokens[1] == [
        Token(1, 0, True, False, 0),
        Token(1, 1, False, False, 0),
        Token(1, 2, False, True, 0),
    ]
    assert [(s.decodes, s.chunks) for s in done.steps] == [(0, [(10, 0)]), (1, []), (1, [])]


def test_a_step_lasts_as_long_as_the_formula_says() -> None:
    engine = Engine(config())
    engine.add(request(1, 10, 5))
    driven = Run(engine)
    driven.step()
    engine.add(request(2, 20, 5))
    step = engine.start_step()
    assert step is not None
    # one decode on 11 tokens of context beside a prefill of 20
    assert step.duration_s == pytest.approx(0.5 + 1.0 + 0.01 * 21 + 0.001 * 20 * 10 + 0.0001 * 11 + 0.1 * 2)


def test_a_long_prompt_is_prefilled_in_chunks_beside_the_decodes() -> None:
    engine = Engine(config())
    engine.add(request(1, 8, 50))
    driven = Run(engine)
    driven.step()
    engine.add(request(2, 150, 2))
    driven.drain()
    assert [s.chunks for s in driven.steps[1:5]] == [[(63, 0)], [(63, 63)], [(24, 126)], []]
    assert all(s.decodes == 1 for s in driven.steps[1:4])


def test_what_a_chunk_leaves_of_the_budget_goes_to_the_next_in_line() -> None:
    done = run(config(), request(1, 100, 1), request(2, 10, 1))
    assert [s.chunks for s in done.steps] == [[(64, 0)], [(36, 64), (10, 0)]]


def test_slots_limit_the_batch() -> None:
    done = run(config(max_num_seqs=2), *(request(i, 4, 3) for i in range(5)))
    assert max(s.decodes + len(s.chunks) for s in done.steps) == 2
    assert done.first_seen == [0, 1, 2, 3, 4]


def test_the_same_prompt_again_hits_all_but_the_last_token() -> None:
    hashes = chain(1, 2, 3)
    done = run(config(), request(1, 12, 1, hashes), request(2, 12, 1, hashes))
    # 12 tokens are 3 full blocks, but the last token must be computed, so its block is
    assert done.cached(2) == 8
    assert done.engine.counters.prefix_queries == 24
    assert done.engine.counters.prefix_hits == 8


def test_the_block_that_is_computed_again_takes_the_place_of_another() -> None:
    a, b = chain(1, 2), chain(3, 4, 5)
    done = run(config(num_blocks=5), request(1, 12, 1, b), request(2, 8, 1, a))
    done.engine.add(
        request(3, 8, 1, a)
    )  # hits the first block of a; the second is computed again, in place of the end of b
    done.drain()
    done.engine.add(request(4, 4, 1, chain(9)))  # both second blocks of a stay, so this takes another of b
    done.drain()
    done.engine.add(request(5, 13, 1, b))
    done.drain()
    assert [done.cached(i) for i in (3, 5)] == [4, 4]


def test_a_hit_ends_at_the_first_block_that_differs() -> None:
    done = run(config(), request(1, 17, 1, chain(1, 2, 3, 4)), request(2, 17, 1, chain(1, 2, 9, 4)))
    assert done.cached(2) == 8


def test_the_next_turn_hits_what_was_generated() -> None:
    first = chain(1, 2, 3, 4, 5)
    done = run(config(), request(1, 8, 13, first))  # 8 + 13 tokens: the last is never computed, so 5 full blocks of 20
    done.engine.add(request(2, 26, 1, (*first, 77)))
    done.drain()
    assert done.cached(2) == 20


def test_without_prefix_caching_nothing_hits() -> None:
    hashes = chain(1, 2, 3)
    done = run(config(prefix_caching=False), request(1, 12, 1, hashes), request(2, 12, 1, hashes))
    assert done.cached(2) == 0


def test_the_least_recently_used_prefix_is_evicted_first_and_of_that_its_end() -> None:
    a, b = chain(1, 2, 3, 4), chain(5, 6, 7, 8)
    done = run(config(num_blocks=9), request(1, 16, 1, a))
    done.engine.add(request(2, 16, 1, b))
    done.drain()
    done.engine.add(request(3, 12, 1))  # the ninth block is blank; two are taken from the end of a
    done.drain()
    done.engine.add(request(4, 17, 1, b))
    done.drain()
    done.engine.add(request(5, 17, 1, a))
    done.drain()
    assert done.cached(4) == 16
    assert done.cached(5) == 8


def test_a_prefix_in_use_is_not_evicted() -> None:
    a = chain(1, 2)
    engine = Engine(config(num_blocks=6))
    engine.add(request(1, 8, 9, a))
    driven = Run(engine)
    driven.step()
    engine.add(request(2, 12, 1))
    driven.drain()
    engine.add(request(3, 9, 1, a))
    driven.drain()
    assert driven.cached(3) == 8


def test_the_youngest_is_preempted_and_computed_again_when_blocks_run_out() -> None:
    done = run(config(num_blocks=6), request(1, 8, 12), request(2, 8, 12))
    assert done.engine.counters.preemptions >= 1
    assert [t.position for t in done.tokens[2]] == list(range(12))
    assert done.ended == [1, 2]
    recomputed = [q for s in done.steps for q, _ in s.chunks if q > 8]
    assert recomputed, "the output so far is prefilled again"


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    # a budget so small that the first chunk of the preempted would fit into what it left
    engine = Engine(config(num_blocks=6, max_num_batched_tokens=9))
    for r in (request(1, 8, 12), request(2, 8, 12)):
        engine.add(r)
    driven = Run(engine)
    while not engine.counters.preemptions:
        before = engine.running
        assert driven.step()
    assert driven.steps[-1].chunks == []
    assert engine.running == before - 1


def test_a_prompt_waits_until_the_whole_of_it_has_room_and_not_only_its_first_chunk() -> None:
    engine = Engine(config(num_blocks=10, max_num_batched_tokens=9))
    engine.add(request(1, 8, 3))
    driven = Run(engine)
    driven.step()
    engine.add(request(2, 36, 1))  # 9 blocks, and 8 are free; its first chunk would take 2
    engine.add(request(3, 4, 1))  # would fit, but is behind
    driven.drain()
    assert [s.chunks for s in driven.steps] == [[(8, 0)], [], [], [(9, 0)], [(9, 9)], [(9, 18)], [(9, 27)], [(4, 0)]]
    assert engine.counters.preemptions == 0


def test_a_preempted_sequence_comes_back_when_its_output_so_far_has_room_too() -> None:
    engine = Engine(config(num_blocks=8, max_num_batched_tokens=10))
    for r in (request(1, 5, 16), request(2, 5, 15)):
        engine.add(r)
    driven = Run(engine)
    while not engine.counters.preemptions:
        assert driven.step()
    assert engine.emitted(2) == 12  # 17 tokens, 5 blocks; 3 are free, and a chunk would take 3
    while driven.steps[-1].chunks == []:
        assert driven.step()
    assert 1 in driven.ended


def test_an_unfinished_prefill_that_runs_short_of_blocks_gives_back_its_own() -> None:
    engine = Engine(config(num_blocks=10, max_num_batched_tokens=9))
    for i in (1, 2, 3):
        engine.add(request(i, 3, 9))
    driven = Run(engine)
    driven.step()
    engine.add(request(4, 24, 1))  # 6 blocks of the 7 that are free; the others take 3 of them while it is prefilled
    engine.add(request(5, 1, 1))
    for _ in range(3):
        driven.step()
    assert [s.chunks for s in driven.steps[1:]] == [[(6, 0)], [(6, 6)], []]
    assert (engine.counters.preemptions, engine.running, engine.waiting) == (1, 3, 2)
    assert driven.drain().ended[-2:] == [4, 5]


def test_usage_counts_blocks_in_use_and_not_cached_ones() -> None:
    engine = Engine(config(num_blocks=10))
    engine.add(request(1, 8, 2, chain(1, 2)))
    driven = Run(engine)
    driven.step()
    assert engine.kv_usage == 0.2
    driven.drain()
    assert engine.kv_usage == 0.0
    assert repr(engine) == "<engine 0 running, 0 waiting, 0% kv>"


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (request(1, 0, 5), Refusal.EMPTY),
        (request(1, 5, 0), Refusal.EMPTY),
        (request(1, 390, 11), Refusal.TOO_LONG),  # 401 tokens in 100 blocks of 4
        (request(7, 5, 5), Refusal.DUPLICATE),
    ],
)
def test_what_could_never_run_is_refused(refused: EngineRequest, why: Refusal) -> None:
    engine = Engine(config())
    engine.add(request(7, 4, 4))
    assert engine.add(refused) is why
    assert engine.waiting == 1


def test_a_request_beyond_the_model_length_is_refused() -> None:
    assert Engine(config(max_model_len=10)).add(request(1, 6, 5)) is Refusal.TOO_LONG


def test_a_batch_that_could_not_decode_is_refused_as_configuration() -> None:
    with pytest.raises(ValueError, match="at least max_num_seqs"):
        config(max_num_seqs=65)


@pytest.mark.parametrize("steps", [0, 1, 4])  # while it waits, is prefilled, decodes
def test_an_abort_frees_everything_at_once(steps: int) -> None:
    engine = Engine(config())
    engine.add(request(1, 100, 50, chain(*range(37))))
    driven = Run(engine)
    for _ in range(steps):
        driven.step()
    assert engine.abort(1)
    engine.check()
    assert (engine.running, engine.waiting, engine.kv_usage) == (0, 0, 0.0)
    assert engine.start_step() is None
    assert not engine.abort(1)


def test_an_id_that_found_no_room_may_come_back_smaller() -> None:
    engine = Engine(config(num_blocks=6))
    engine.add(request(1, 10, 10))
    driven = Run(engine)
    driven.step()
    engine.add(request(2, 20, 1))
    driven.step()
    assert engine.waiting == 1
    engine.abort(2)
    engine.add(request(2, 4, 1))
    driven.step()
    assert len(driven.tokens[2]) == 1


def test_an_abort_in_the_middle_of_a_step_silences_the_request() -> None:
    engine = Engine(config())
    for i in (1, 2, 3):
        engine.add(request(i, 4, 3))
    driven = Run(engine)
    step = engine.start_step()
    assert step
    engine.abort(2)
    driven.finish(step)
    step = engine.start_step()
    assert step
    engine.abort(3)
    driven.finish(step)
    driven.drain()
    assert {id_: len(tokens) for id_, tokens in driven.tokens.items()} == {1: 3, 3: 1}


# --- asynchronous scheduling --------------------------------------------------------------------------------------------


def ahead(*requests: EngineRequest, **changes: object) -> Run:
    """An engine that decides a step ahead, after the first step of `requests`."""
    engine = Engine(config(async_scheduling=True, **changes))  # type: ignore[arg-type]
    for r in requests:
        assert engine.add(r) is None
    driven = Run(engine)
    driven.step()
    return driven


def test_an_idle_engine_starts_at_once_and_decides_its_second_step_too() -> None:
    driven = ahead(request(1, 100, 2))
    assert [s.admitted for s in driven.steps] == [[1]]
    driven.engine.add(request(2, 10, 1))
    driven.drain()
    assert [s.chunks for s in driven.steps] == [[(64, 0)], [(36, 64)], [(10, 0)]]
    assert [(s.decodes, s.admitted) for s in driven.steps] == [(0, [1]), (0, [2]), (1, [])]


def test_a_request_that_comes_during_a_step_is_prefilled_in_the_second_after_it() -> None:
    driven = ahead(request(1, 4, 6))
    step = driven.engine.start_step()
    assert step
    driven.engine.add(request(2, 10, 2))
    driven.finish(step)
    driven.drain()
    assert [(s.decodes, s.chunks) for s in driven.steps[2:5]] == [(1, []), (1, [(10, 0)]), (2, [])]
    assert [s.admitted for s in driven.steps[2:4]] == [[2], []]


def test_what_a_step_frees_is_seen_only_once_it_is_over() -> None:
    driven = ahead(request(1, 4, 2), max_num_seqs=1)
    driven.engine.add(request(2, 4, 1))
    driven.drain()
    # the second step ends 1; the third, which is empty, was decided before that, so 2 finds an idle engine
    assert [(s.decodes, s.admitted) for s in driven.steps] == [(0, [1]), (1, []), (0, [2])]
    driven = ahead(request(1, 4, 2), request(3, 4, 4), max_num_seqs=2)
    driven.engine.add(request(2, 4, 1))
    driven.drain()
    assert [(s.decodes, s.chunks) for s in driven.steps[1:]] == [(2, []), (1, []), (1, [(4, 0)])]


def test_the_budget_decided_ahead_is_what_those_that_will_decode_leave() -> None:
    driven = ahead(request(1, 30, 1), request(2, 30, 3), request(3, 230, 1)).drain()
    # 1 is over with its first token; 2 decodes in the second and third step, and in the fourth no more
    assert [(s.decodes, s.chunks[-1][0]) for s in driven.steps] == [(0, 4), (1, 63), (1, 63), (0, 64), (0, 36)]


def test_a_step_before_a_prefill_is_not_quiet() -> None:
    driven = ahead(request(1, 4, 30))
    quiet = driven.engine.start_step()
    assert quiet
    assert driven.engine.quiet_steps(quiet) == 28
    driven.engine.add(request(2, 4, 1))
    driven.finish(quiet)
    before = driven.engine.start_step()
    assert before
    assert before.chunks == []
    assert driven.engine.quiet_steps(before) == 0


def test_what_was_decided_for_a_request_falls_out_when_it_is_aborted() -> None:
    driven = ahead(request(1, 4, 6))
    driven.engine.add(request(2, 10, 2))
    driven.step()
    assert driven.steps[-1].admitted == [2]
    driven.engine.abort(2)
    driven.engine.add(request(2, 12, 1))  # the same name, another request
    driven.drain()
    assert [s.chunks for s in driven.steps[1:]] == [[], [], [(12, 0)], [], []]


def test_an_engine_that_decides_ahead_gives_the_same_tokens() -> None:
    rnd = random.Random(7)
    load = [request(i, rnd.randint(1, 90), rnd.randint(1, 30)) for i in range(30)]
    both = [run(config(num_blocks=40, async_scheduling=a), *load) for a in (False, True)]
    assert both[0].tokens == both[1].tokens
    assert all(r.engine.counters.preemptions for r in both)


# --- what holds for any load ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A request, when it comes and when it is given up: in step counts."""

    at: int
    request: EngineRequest
    abort_at: int | None


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    found = []
    for i in range(draw(st.integers(1, 14))):
        prompt, output = draw(st.integers(1, 60)), draw(st.integers(1, 30))
        # a few families that share prefixes, and a point from which each request goes its own way
        family, shared = draw(st.integers(0, 2)), draw(st.integers(0, 15))
        blocks = (prompt + draw(st.sampled_from([0, output]))) // 4
        hashes = chain(*((family, n) if n < shared else (i, n) for n in range(blocks)))  # type: ignore[arg-type]
        abort_at = draw(st.none() | st.integers(0, 40))
        found.append(Plan(draw(st.integers(0, 30)), request(i, prompt, output, hashes), abort_at))
    return sorted(found, key=lambda p: p.at)


def play(engine: Engine, planned: list[Plan]) -> Run:
    driven, clock = Run(engine), 0
    left = list(planned)
    while left or engine.running or engine.waiting:
        while left and left[0].at <= clock:
            assert engine.add(left.pop(0).request) is None
        step = engine.start_step()
        for p in planned:
            if p.abort_at == clock:
                engine.abort(p.request.id)
        engine.check()
        if step:
            driven.finish(step)
        clock += 1
        assert clock < 5000, f"no progress: {engine!r}"
    return driven


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(23, 40), st.integers(1, 5), st.sampled_from([5, 16, 64]), st.booleans())
def test_tokens_blocks_and_order_hold_for_any_load(
    planned: list[Plan], blocks: int, slots: int, budget: int, ahead: bool
) -> None:
    sizes = {"max_num_seqs": slots, "max_num_batched_tokens": budget}
    engine = Engine(config(blocks, async_scheduling=ahead, **sizes))
    driven = play(engine, planned)
    by_id = {p.request.id: p for p in planned}
    for id_, tokens in driven.tokens.items():
        wanted = by_id[id_].request
        assert [t.position for t in tokens] == list(range(len(tokens)))
        assert [t.first for t in tokens] == [True] + [False] * (len(tokens) - 1)
        ended = len(tokens) == wanted.output_tokens
        assert [t.finished for t in tokens] == [False] * (len(tokens) - 1) + [ended]
        assert tokens[0].cached_tokens <= wanted.prompt_tokens - 1
        assert tokens[0].cached_tokens % 4 == 0
        assert ended or by_id[id_].abort_at is not None
    assert all(p.request.id in driven.tokens or p.abort_at is not None for p in planned)
    arrivals = [p.request.id for p in planned]
    assert driven.first_seen == sorted(driven.first_seen, key=arrivals.index)
    counters = engine.counters
    assert counters.generated_tokens == sum(map(len, driven.tokens.values()))
    ends = sum(tokens[-1].finished for tokens in driven.tokens.values())
    assert (counters.finished, engine.pool.used) == (ends, 0)
    assert all(s.new_tokens <= budget for s in driven.steps)


@given(st.integers(1, 80), st.integers(0, 25))
def test_a_hit_is_the_shared_blocks_and_nothing_else(prompt: int, shared: int) -> None:
    cfg = config(max_num_batched_tokens=100)
    first = chain(*range(20))
    second = chain(*(n if n < shared else -n - 1 for n in range(prompt // 4)))
    done = run(cfg, request(1, 80, 1, first))
    done.engine.add(request(2, prompt, 1, second))
    done.drain()
    assert done.cached(2) == min(shared, 20, (prompt - 1) // 4) * 4


def test_the_same_requests_give_the_same_steps() -> None:
    rnd = random.Random(5)
    load = [request(i, rnd.randint(1, 60), rnd.randint(1, 30)) for i in range(30)]
    runs = [run(config(num_blocks=30), *load) for _ in range(2)]
    durations = [[s.duration_s for s in r.steps] for r in runs]
    assert durations[0] == durations[1]
