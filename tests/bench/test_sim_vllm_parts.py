"""Parts of the comparison with real vLLM: a plan that waits for ever, or a comparison that cannot fail, would be worth nothing."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from extproc.sim.engine import Engine, EngineConfig, EngineRequest
from extproc.sim.traces import Generate, Trace, Turn
from tests.bench.sim_vllm import Played, compare_runs, engine_request, hits, in_step, simulate, tables, timed
from tests.bench.sim_vllm_plan import Ask, Content, Dispatch, Plan, asked_again, behind, chained, filling, plan
from tests.bench.sim_vllm_real import STEP_TIME, Answer, Client, Iteration, idle, iterations, read
from tests.support.waiting import until

CONFIG = EngineConfig(STEP_TIME, 99, 8, 256, 4, 400, async_scheduling=False, cpu_overhead_s=0.0)
FEW = Generate(
    sessions=24,
    sessions_per_s=100,
    turns=3,
    think_s=0.1,
    tenants=2,
    system_tokens=60,
    user_tokens=20,
    output_tokens=12,
    max_tokens=200,
)


def planned(seed: int = 1) -> Plan:
    return plan(CONFIG, 2, seed, FEW.model_copy(update={"user_sigma": 0.4, "output_sigma": 0.4}))


def stand_in(plan: Plan, seed: int = 1) -> list[Answer]:
    """As if replicas had answered, with tokens of no model; nothing was cached."""
    content, answers = Content(CONFIG.block_size, seed), []
    for place, ask in enumerate(plan.asks):
        tokens = content.prompt(ask, place) + [place] * ask.output_tokens
        content.answered(ask, tokens)
        answers.append(Answer(0, 0.0, 0.0, 0.0, chained(tokens, CONFIG.block_size)))
    return answers


def played(at_once: int, config: EngineConfig = CONFIG) -> Played:
    """A run on simulated replicas, taken for real ones."""
    made = planned()
    prepared = stand_in(made)
    answers = simulate(made, prepared, config, at_once)
    named = [replace(a, hashes=p.hashes) for a, p in zip(answers, prepared, strict=True)]
    return Played(made, config, at_once, named)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_nobody_comes_before_those_it_waits_for_and_both_replicas_have_work() -> None:
    made = planned()
    assert all(max(ask.after, default=-1) < place for place, ask in enumerate(made.asks))
    assert min(Counter(made.asks[place].replica for place in made.scored).values()) > 5
    assert any(ask.after for ask in made.asks[made.first :])


def test_the_caches_are_filled_first_block_for_block() -> None:
    fill = filling(CONFIG, 2)
    for replica in (0, 1):
        blocks = [b for ask in fill if ask.replica == replica for b in ask.blocks]
        assert len(blocks) == len(set(blocks)) >= CONFIG.num_blocks
    assert all(block < 0 for ask in fill for block in ask.blocks)
    made = behind(fill, [Ask(0, 8, 1, (1,)), Ask(0, 8, 1, (2,)), Ask(1, 8, 1, (3,), (0,))], 2)
    everything = tuple(range(len(fill)))
    assert [ask.after for ask in made.asks[made.first :]] == [everything, (), (made.first, *everything)]


def test_some_prompts_are_whole_blocks_and_asked_twice() -> None:
    trace = asked_again(Trace("t", 8, tuple(Turn(21, 10, 0.0, None, ((5, 3),)) for _ in range(10))))
    assert [t.prompt_tokens for t in trace.turns] == [16, *[21] * 7, 16, 21, 16, 16]
    assert [t.after for t in trace.turns[10:]] == [0, 8]
    assert trace.turns[0].runs == trace.turns[10].runs == ((5, 3),)
    assert asked_again(Trace("t", 8, (Turn(16, 7, 0.0, None, ((5, 9),)),))).turns[1].runs == ((5, 2),)


def test_each_replica_has_so_many_at_a_time_in_order() -> None:
    asks = [Ask(0, 8, 1, ()), Ask(0, 8, 1, ()), Ask(1, 8, 1, (), (1,)), Ask(0, 8, 1, ()), Ask(1, 8, 1, ())]
    dispatch = Dispatch(Plan(tuple(asks), 0, 2), 2)
    assert dispatch.take() == [0, 1]  # 4 is free to go, but behind 2, which waits for 1
    dispatch.end(0)
    assert dispatch.take() == [3]
    dispatch.end(1)
    assert dispatch.take() == [2, 4]
    assert repr(dispatch) == "<dispatch 2/5 ended>"


def test_a_later_turn_repeats_what_was_answered() -> None:
    content = Content(4, seed=1)
    first = Ask(0, 6, 7, (1, 2, 3))
    prompt = content.prompt(first, 0)
    content.answered(first, [*prompt, *range(100, 107)])
    later = content.prompt(Ask(0, 18, 1, (1, 2, 3, 4)), 1)
    assert later[:12] == [*prompt, *range(100, 106)]
    assert later[:16] == content.prompt(Ask(0, 16, 1, (1, 2, 3, 4)), 2)
    assert content.prompt(Ask(0, 18, 1, (1, 2, 3, 4)), 3)[16:] != later[16:]
    assert Content(4, seed=2).prompt(first, 0) != prompt


def test_hashes_are_of_full_blocks_and_all_before_them() -> None:
    one, other = chained(range(11), 4), chained([9, *range(1, 11)], 4)
    assert len(one) == 2
    assert one == chained(range(8), 4)
    assert not set(one) & set(other)


# --- what a real one tells --------------------------------------------------------------------------------------------

STREAM = (
    b'data: {"choices": [{"token_ids": [5]}]}\n\n'
    b": keep-alive\n\n"
    b'data: {"choices": [{"token_ids": [6, 7]}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 64}}}\n\n'
    b"data: [DONE]\n\n"
)


async def test_a_stream_has_tokens_and_usage() -> None:
    async def lines() -> AsyncIterator[bytes]:
        for line in STREAM.splitlines(keepends=True):
            yield line

    found = await read(lines())
    assert (found.tokens, found.cached_tokens) == ([5, 6, 7], 64)
    assert found.first_s <= found.last_s


LOG = """(APIServer pid=1) INFO 11-21 03:31:35 [loggers.py:199] Engine 000: Iteration(17): 2 context requests, 90 context tokens, 3 generation requests, 3 generation tokens, iteration elapsed time: 1.38 ms, CPU KV cache usage: 25.1%
INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK
(APIServer pid=1) INFO 11-21 03:31:35 [loggers.py:199] Engine 000: Iteration(18): 0 context requests, 0 context tokens, 1 generation requests, 1 generation tokens, iteration elapsed time: 1.69 ms, CPU KV cache usage: 0.0%
"""


def test_steps_are_read_from_the_log_which_ends_when_nothing_is_left() -> None:
    assert iterations(LOG) == [Iteration(2, 5, 93), Iteration(0, 1, 1)]
    assert idle(LOG)
    assert idle(LOG + LOG.splitlines()[1])
    assert not idle(LOG[:-6])
    assert not idle("")
    assert not idle("\n".join(LOG.splitlines()[:1]))


@dataclass
class Server:
    """Answers any prompt with the tokens 7, but not before the next has come; remembers who came when."""

    expected: int
    came: list[int] = field(default_factory=list)
    overtaken: bool = False
    """One came before the one ahead of it had its headers."""
    headers: int = 0
    under_way: int = 0
    most: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.came.append(body["prompt"][0])
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        place = len(self.came)
        self.overtaken |= self.headers < place - 1
        await asyncio.sleep(0.01)  # time to be overtaken
        response = web.StreamResponse()
        await response.prepare(request)
        self.headers += 1
        await until(lambda: len(self.came) > place or place == self.expected)
        lines: list[dict[str, Any]] = [{"choices": [{"token_ids": [7]}]}] * body["max_tokens"]
        usage = {"prompt_tokens_details": {"cached_tokens": len(body["prompt"])}}
        for line in [*lines, {"choices": [], "usage": usage}]:
            await response.write(b"data: " + json.dumps(line).encode() + b"\n\n")
        self.under_way -= 1
        return response


async def test_the_client_keeps_the_order_and_never_exceeds_its_number() -> None:
    server, app = Server(30), web.Application()
    app.router.add_post("/v1/completions", server.answer)
    made = Plan(tuple(Ask(0, 4, 1 + i % 3, (i,), (i - 5,) if i > 4 else ()) for i in range(30)), 0, 1)
    content = Content(4, 1)
    async with TestServer(app) as running, aiohttp.ClientSession() as http:
        client = Client(http, [str(running.make_url("")).rstrip("/")], "m", 4, content)
        answers = await client.play(made, 3)
    assert server.came == [content.prompt(ask, place)[0] for place, ask in enumerate(made.asks)]
    assert not server.overtaken
    assert 1 < server.most <= 3
    assert {a.cached_tokens for a in answers} == {4}
    assert answers[2].hashes == chained([*content.prompt(made.asks[2], 2), 7, 7, 7], 4)
    assert all(a.sent_s <= a.first_s <= a.last_s for a in answers)


# --- in the simulation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_simulation_agrees_with_itself(at_once: int) -> None:
    run = played(at_once)
    found = run.hits()
    assert found["equal"] == found["requests"] == len(run.plan.scored)
    assert 0 < found["cached_tokens"]["real"] < found["prompt_tokens"]
    assert found["off_by_tokens"] == 0
    assert run.hits_in_step() is None


def test_a_smaller_cache_is_seen_as_another() -> None:
    run = replace(played(1, replace(CONFIG, num_blocks=80)), config=CONFIG)
    found = run.hits()
    assert found["equal"] < found["requests"]
    assert found["cached_tokens"]["real"] < found["cached_tokens"]["sim"]
    assert len(found["different"]) == found["requests"] - found["equal"]


def test_what_never_came_counts_as_different() -> None:
    made = Plan((Ask(0, 8, 1, ()), Ask(0, 8, 1, ()), Ask(0, 8, 1, ())), 1, 1)
    real = [Answer(tokens, 0.0, 0.0, 0.0) for tokens in (8, 16, 24)]
    found = hits(made, real, [0, 16, None])
    assert (found["requests"], found["equal"], found["off_by_tokens"]) == (2, 1, 24)
    assert found["different"] == [{"place": 2, "replica": 0, "real": 24, "sim": 0}]


def log_of(requests: Sequence[EngineRequest], config: EngineConfig, together: int) -> tuple[list[Iteration], list[int]]:
    """The steps of an engine that gets so many requests every other step, as vLLM would log them; and what each had cached."""
    engine, left, steps = Engine(config), list(requests), []
    cached: dict[object, int] = {}
    while left or engine.running or engine.waiting:
        if engine.counters.steps % 2 == 0:
            for request in left[:together]:
                engine.add(request)
            left = left[together:]
        if not (step := engine.start_step()):
            continue
        new = sum(seq.emitted == 0 for seq in step.prefills)
        steps.append(Iteration(new, len(step.chunks) + step.decodes, step.new_tokens))
        cached |= {t.id: t.cached_tokens for t in engine.finish_step(step).edges if t.first}
    assert engine.counters.preemptions
    return steps, [cached[request.id] for request in requests]


def test_an_engine_is_led_through_the_steps_of_another() -> None:
    made = planned()
    prepared = stand_in(made)
    requests = [engine_request(ask, i, prepared[i].hashes) for i, ask in enumerate(made.asks) if ask.replica == 0]
    tight = replace(CONFIG, num_blocks=52)
    steps, cached = log_of(requests, tight, together=3)
    found = in_step(requests, steps, tight)
    assert (found.steps, found.different) == (len(steps), 0)
    assert [found.cached[request.id] for request in requests] == cached
    other = in_step(requests, steps, CONFIG)
    assert other.different > 0


def test_the_run_that_was_led_counts_every_replica() -> None:
    run = played(1)
    steps = [
        log_of_one_by_one(
            [engine_request(a, i, run.answers[i].hashes) for i, a in enumerate(run.plan.asks) if a.replica == r]
        )
        for r in (0, 1)
    ]
    found = replace(run, steps=steps).hits_in_step()
    assert found is not None
    assert (found["equal"], found["different_steps"]) == (found["requests"], 0)
    assert found["steps"] == sum(map(len, steps))


def log_of_one_by_one(requests: Sequence[EngineRequest]) -> list[Iteration]:
    engine, steps = Engine(CONFIG), []
    for request in requests:
        engine.add(request)
        while step := engine.start_step():
            steps.append(Iteration(len(step.chunks), len(step.chunks) + step.decodes, step.new_tokens))
            engine.finish_step(step)
    return steps


# --- compare ----------------------------------------------------------------------------------------------------------


def test_times_count_from_the_first_that_counts() -> None:
    made = Plan((Ask(0, 8, 1, ()), Ask(0, 9, 2, ()), Ask(0, 8, 1, ())), 1, 1)
    [one, _] = timed(made, [Answer(0, 1.0, 2.0, 3.0), Answer(0, 5.0, 6.0, 8.0), Answer(0, 6.0, 7.0, 8.0)])
    assert (one.arrived_s, one.ttft_s, one.tpot_s, one.last_token_s) == (0.0, 1.0, 2.0, 3.0)


def test_a_run_of_the_simulation_is_foretold_from_its_other_half() -> None:
    truth = replace(STEP_TIME, c0=6e-3, g=5e-5)
    run = replace(played(3, replace(CONFIG, step_time=truth)), config=CONFIG)
    ticks: list[None] = []
    found = run.fitted("late", lambda: ticks.append(None))
    assert abs(found["ttft_s"]["mean"]["error"]) < 0.05
    assert abs(found["tpot_s"]["p50"]["error"]) < 0.05
    assert abs(found["makespan_s"]["error"]) < 0.05
    assert found["constants"]["c0"] > STEP_TIME.c0
    assert 50 < len(ticks) <= 520
    whole = {
        "sequential": {"hits": run.hits(), "in_step": None},
        "concurrent": {
            "hits": run.hits(),
            "in_step": {**run.hits(), "steps": 9, "different_steps": 1},
            "times": {"late": found},
        },
        "again": compare_runs(run, run),
    }
    assert [table.row_count for table in tables(whole)] == [5, 2]
    json.dumps(whole)
